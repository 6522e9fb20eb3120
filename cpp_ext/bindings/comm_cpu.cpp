// The shared-memory all-to-all as ops on handles. Python owns the life of a communicator; see ops/shm_communicator.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "../comm/shm_all_to_all.h"
#include "../common/check.h"
#include "../kernels/kernels.h"

namespace {

using at::Tensor;
using samoe::comm::Mapping;
using samoe::comm::Part;
using samoe::comm::Progress;
using samoe::comm::ShmAllToAll;

std::mutex registry_mutex;

std::map<int64_t, std::shared_ptr<ShmAllToAll>>& registry() {
  static std::map<int64_t, std::shared_ptr<ShmAllToAll>> communicators;
  return communicators;
}

std::shared_ptr<ShmAllToAll> find(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(handle);
  TORCH_CHECK_VALUE(found != registry().end(), "no communicator has the handle ", handle, "; it may be closed");
  return found->second;
}

int64_t shm_create(int64_t rank, int64_t world, int64_t spins) {
  TORCH_CHECK_VALUE(world >= 1 && world <= 4096 && rank >= 0 && rank < world, "rank ", rank, " of ", world);
  auto communicator =
      std::make_shared<ShmAllToAll>(static_cast<int>(rank), static_cast<int>(world), static_cast<int>(spins));
  const std::string problem = communicator->create();
  TORCH_CHECK(problem.empty(), problem);
  static int64_t next_handle = 0;
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[++next_handle] = std::move(communicator);
  return next_handle;
}

std::string shm_address(int64_t handle) { return find(handle)->address(); }

std::string shm_connect(int64_t handle, const std::vector<std::string>& addresses) {
  return find(handle)->connect(addresses);
}

// A rank's parts of a tensor: at the given byte offsets, or one after the other and together all of it.
std::vector<Part> parts_of(const std::vector<int64_t>& offsets, const std::vector<int64_t>& bytes, const Tensor& tensor,
                           int world, const char* name) {
  TORCH_CHECK_VALUE(static_cast<int>(bytes.size()) == world && (offsets.empty() || offsets.size() == bytes.size()),
                    name, " has ", bytes.size(), " splits for ", world, " ranks");
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), name, " is not a contiguous CPU tensor");
  const int64_t size = static_cast<int64_t>(tensor.nbytes());
  std::vector<Part> parts;
  int64_t end = 0;
  for (size_t r = 0; r < bytes.size(); ++r) {
    TORCH_CHECK_VALUE(bytes[r] >= 0, name, " has a negative split of ", bytes[r], " bytes");
    const int64_t offset = offsets.empty() ? end : offsets[r];
    TORCH_CHECK_VALUE(offset >= 0 && offset <= size - bytes[r], name, " has ", size, " bytes and a part from ", offset,
                      " to ", offset + bytes[r]);
    parts.push_back({offset, bytes[r]});
    end = offset + bytes[r];
  }
  TORCH_CHECK_VALUE(!offsets.empty() || end == size, name, " has ", size, " bytes and its splits sum to ", end);
  return parts;
}

// What Python hears: an empty string for done, "pending", or the reason of the failure.
std::string shm_run(int64_t handle, double seconds, double timeout_s) {
  const auto communicator = find(handle);
  switch (communicator->run(seconds, timeout_s)) {
    case Progress::done:
      return "";
    case Progress::pending:
      return "pending";
    default:
      return communicator->error();
  }
}

std::string shm_all_to_all(int64_t handle, const Tensor& input, const Tensor& output,
                           const std::vector<int64_t>& send_offsets, const std::vector<int64_t>& send_bytes,
                           const std::vector<int64_t>& recv_offsets, const std::vector<int64_t>& recv_bytes,
                           double seconds, double timeout_s) {
  const auto communicator = find(handle);
  const int world = communicator->world();
  const std::string problem = communicator->start(static_cast<const char*>(input.const_data_ptr()),
                                                  static_cast<char*>(output.mutable_data_ptr()),
                                                  parts_of(send_offsets, send_bytes, input, world, "input"),
                                                  parts_of(recv_offsets, recv_bytes, output, world, "output"));
  return problem.empty() ? shm_run(handle, seconds, timeout_s) : problem;
}

// Rows of x, row index[r] / divisor as row r, in the window of this rank, and a state as of shm_run; the state
// "unavailable: ..." means that there is no such memory, and nothing else.
std::tuple<Tensor, std::string> shm_stage_rows(int64_t handle, const Tensor& x, const Tensor& index, int64_t divisor,
                                               double seconds, double timeout_s) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.dim() == 2 && x.is_contiguous(), "x is not a contiguous CPU matrix");
  samoe::check_contiguous(index, "index", 1, at::kLong);
  TORCH_CHECK_VALUE(divisor >= 1, "divisor = ", divisor);
  samoe::check_index(index, "index", 0, x.size(0) * divisor);
  const int64_t num_rows = index.size(0), row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  std::shared_ptr<Mapping> memory;
  std::string why;
  const auto communicator = find(handle);
  switch (communicator->stage(num_rows * row_bytes, seconds, timeout_s, &memory, &why)) {
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

void shm_abort(int64_t handle, const std::string& reason) { find(handle)->abort(reason); }

void shm_close(int64_t handle) {
  std::shared_ptr<ShmAllToAll> communicator;
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = registry().find(handle);
    if (found == registry().end()) return;
    communicator = found->second;
    registry().erase(found);
  }
  communicator->close();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_samoe, m) {
  m.def("shm_create(int rank, int world, int spins) -> int", shm_create);
  m.def("shm_address(int handle) -> str", shm_address);
  m.def("shm_connect(int handle, str[] addresses) -> str", shm_connect);
  m.def(
      "shm_all_to_all(int handle, Tensor input, Tensor(a!) output, int[] send_offsets, int[] send_bytes,"
      " int[] recv_offsets, int[] recv_bytes, float seconds, float timeout_s) -> str");
  m.def(
      "shm_stage_rows(int handle, Tensor x, Tensor index, int divisor, float seconds, float timeout_s)"
      " -> (Tensor rows, str state)");
  m.def("shm_run(int handle, float seconds, float timeout_s) -> str", shm_run);
  m.def("shm_abort(int handle, str reason) -> ()", shm_abort);
  m.def("shm_close(int handle) -> ()", shm_close);
}

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  m.impl("shm_all_to_all", shm_all_to_all);
  m.impl("shm_stage_rows", shm_stage_rows);
}
