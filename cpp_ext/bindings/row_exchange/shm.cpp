// The shared-memory all-to-all: its making, and the memory that peers copy from; see row_exchange/shm_communicator.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>

#include "../../comm/shm_all_to_all.h"
#include "../check.h"
#include "../../kernels/kernels.h"
#include "communicators.h"

namespace {

using at::Tensor;
using samoe::comm::Mapping;
using samoe::comm::Progress;
using samoe::comm::ShmAllToAll;

int64_t shm_create(int64_t rank, int64_t world, int64_t spins, double timeout_s) {
  TORCH_CHECK_VALUE(world >= 1 && world <= 4096 && rank >= 0 && rank < world, "rank ", rank, " of ", world);
  auto communicator =
      std::make_shared<ShmAllToAll>(static_cast<int>(rank), static_cast<int>(world), static_cast<int>(spins), timeout_s);
  const std::string problem = communicator->create();
  TORCH_CHECK(problem.empty(), problem);
  return samoe::add_communicator({std::move(communicator), c10::Device(c10::kCPU), std::nullopt});
}

// Rows of x, row index[r] / divisor as row r, in the window of this rank, and a state as of all_to_all_finish; the
// state "unavailable: ..." means that there is no such memory, and nothing else.
std::tuple<Tensor, std::string> shm_stage_rows(int64_t handle, const Tensor& x, const Tensor& index, int64_t divisor,
                                               double seconds) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.dim() == 2 && x.is_contiguous(), "x is not a contiguous CPU matrix");
  samoe::check_contiguous(index, "index", 1, at::kLong);
  TORCH_CHECK_VALUE(divisor >= 1, "divisor = ", divisor);
  samoe::check_index(index, "index", 0, x.size(0) * divisor);
  const int64_t num_rows = index.size(0), row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  std::shared_ptr<Mapping> memory;
  std::string why;
  const auto communicator = samoe::find_transport<ShmAllToAll>(handle);
  switch (communicator->stage(num_rows * row_bytes, seconds, communicator->timeout_s(), &memory, &why)) {
    case Progress::pending:
      return {at::empty({0, x.size(1)}, x.options()), "pending"};
    case Progress::failed:
      return {at::empty({0, x.size(1)}, x.options()), why.empty() ? communicator->error() : "unavailable: " + why};
    default:
      break;
  }
  const int64_t useful = 2 * num_rows * row_bytes / 32768;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(useful, at::get_num_threads())));
  samoe::cpu::kernels().gather_rows({static_cast<const char*>(x.const_data_ptr()), index.const_data_ptr<int64_t>(),
                                     num_rows, divisor, row_bytes, memory->base, threads});
  char* base = memory->base;
  return {at::from_blob(base, {num_rows, x.size(1)}, [memory](void*) mutable { memory.reset(); }, x.options()), ""};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_samoe, m) {
  m.def("shm_create(int rank, int world, int spins, float timeout_s) -> int", shm_create);
  m.def(
      "shm_stage_rows(int handle, Tensor x, Tensor index, int divisor, float seconds)"
      " -> (Tensor rows, str state)");
}

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) { m.impl("shm_stage_rows", shm_stage_rows); }
