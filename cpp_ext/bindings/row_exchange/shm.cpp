// The shared-memory all-to-all: its making, and the memory that peers copy from; see row_exchange/shm_communicator.py.

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>

#include "../../comm/shm_all_to_all.h"
#include "../check.h"
#include "../../kernels/kernels.h"
#include "communicators.h"

namespace {

using namespace samoe;
using samoe::comm::Mapping;
using samoe::comm::Progress;
using samoe::comm::ShmAllToAll;

int64_t shm_create(int64_t rank, int64_t world, int64_t spins, double timeout_s) {
  SAMOE_CHECK(world >= 1 && world <= 4096 && rank >= 0 && rank < world, "rank ", rank, " of ", world);
  check_range(spins, "spins", 0, INT32_MAX);
  auto communicator =
      std::make_shared<ShmAllToAll>(static_cast<int>(rank), static_cast<int>(world), static_cast<int>(spins), timeout_s);
  const std::string problem = communicator->create();
  SAMOE_CHECK(problem.empty(), problem);
  return add_communicator({std::move(communicator), Device(DeviceType::CPU)});
}

// Rows of x, row index[r] / divisor as row r, in the window of this rank, and a state as of all_to_all_finish; the
// state "unavailable: ..." means that there is no such memory, and nothing else.
std::tuple<Tensor, std::string> shm_stage_rows(int64_t handle, const Tensor& x, const Tensor& index, int64_t divisor,
                                               double seconds) {
  SAMOE_CHECK(x.device().is_cpu() && x.dim() == 2 && x.is_contiguous(), "x is not a contiguous CPU matrix");
  check_contiguous(index, "index", 1, kLong);
  check_range(divisor, "divisor", 1, INT64_MAX);
  check_index(index, "index", 0, product({x.size(0), divisor}));
  const int64_t num_rows = index.size(0), row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  std::shared_ptr<Mapping> memory;
  std::string why;
  const auto communicator = find_transport<ShmAllToAll>(handle);
  switch (communicator->stage(num_rows * row_bytes, seconds, communicator->timeout_s(), &memory, &why)) {
    case Progress::pending:
      return {uninitialized({0, x.size(1)}, x), "pending"};
    case Progress::failed:
      return {uninitialized({0, x.size(1)}, x), why.empty() ? communicator->error() : "unavailable: " + why};
    default:
      break;
  }
  const int64_t useful = 2 * num_rows * row_bytes / 32768;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(useful, num_threads())));
  cpu::kernels().gather_rows({static_cast<const char*>(x.const_data_ptr()), index.const_data_ptr<int64_t>(),
                                     num_rows, divisor, row_bytes, memory->base, threads});
  char* base = memory->base;
  const Tensor rows = torch::stable::from_blob(base, {num_rows, x.size(1)}, {x.size(1), 1}, x.device(), x.scalar_type(),
                                               [memory](void*) mutable { memory.reset(); });
  return {rows, ""};
}

}  // namespace

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) { SAMOE_IMPL(m, "shm_stage_rows", shm_stage_rows); }

// Of no tensors.
SAMOE_LIBRARY_IMPL(megatron_samoe, CompositeExplicitAutograd, m) { SAMOE_IMPL(m, "shm_create", shm_create);  }
