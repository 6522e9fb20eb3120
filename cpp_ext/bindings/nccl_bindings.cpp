// The NCCL all-to-all as ops on handles, for every device: streams and events come from torch's device-generic
// interface, so the same file serves a CPU torch (with the library of the tests) and a CUDA torch.
#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../comm/nccl_all_to_all.h"

namespace {

using at::Tensor;
using samoe::comm::nccl_api;
using samoe::comm::NcclAllToAll;
using samoe::comm::NcclApi;
using samoe::comm::NcclUniqueId;

std::mutex registry_mutex;

std::map<int64_t, std::shared_ptr<NcclAllToAll>>& registry() {
  // Never destroyed: at exit the library and the device may be gone before it.
  static auto* communicators = new std::map<int64_t, std::shared_ptr<NcclAllToAll>>();
  return *communicators;
}

std::shared_ptr<NcclAllToAll> find(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(handle);
  TORCH_CHECK_VALUE(found != registry().end(), "no communicator has the handle ", handle, "; it may be closed");
  return found->second;
}

const NcclApi* api_or_throw() {
  std::string why;
  const NcclApi* api = nccl_api(&why);
  TORCH_CHECK(api != nullptr, why);
  return api;
}

// An empty string where NCCL can be used, else why not.
std::string nccl_problem() {
  std::string why;
  return nccl_api(&why) != nullptr ? "" : why;
}

std::string nccl_library() {
  const NcclApi* api = api_or_throw();
  return api->library + " " + std::to_string(api->version) + (api->takes_host_memory ? " (host memory)" : "");
}

std::vector<int64_t> nccl_unique_id() {
  NcclUniqueId id;
  const NcclApi* api = api_or_throw();
  const int result = api->get_unique_id(&id);
  TORCH_CHECK(result == samoe::comm::kNcclSuccess, "ncclGetUniqueId: ", api->get_error_string(result));
  std::vector<int64_t> words(sizeof id / sizeof(int64_t));
  std::memcpy(words.data(), &id, sizeof id);
  return words;
}

int64_t nccl_create(int64_t rank, int64_t world) {
  TORCH_CHECK_VALUE(world >= 1 && rank >= 0 && rank < world, "rank ", rank, " of ", world);
  auto communicator = std::make_shared<NcclAllToAll>(api_or_throw(), static_cast<int>(rank), static_cast<int>(world));
  static int64_t next_handle = 0;
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[++next_handle] = std::move(communicator);
  return next_handle;
}

std::string nccl_connect(int64_t handle, const std::vector<int64_t>& unique_id, double timeout_s) {
  NcclUniqueId id;
  TORCH_CHECK_VALUE(unique_id.size() * sizeof(int64_t) == sizeof id, "a unique id has ", sizeof id / 8, " words");
  std::memcpy(&id, unique_id.data(), sizeof id);
  return find(handle)->connect(id, timeout_s);
}

void check_splits(const std::vector<int64_t>& bytes, const Tensor& tensor, int world, const char* name) {
  TORCH_CHECK_VALUE(static_cast<int>(bytes.size()) == world, name, " has ", bytes.size(), " splits for ", world,
                    " ranks");
  int64_t total = 0;
  for (const int64_t part : bytes) {
    TORCH_CHECK_VALUE(part >= 0, name, " has a negative split of ", part, " bytes");
    total += part;
  }
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " is not contiguous");
  TORCH_CHECK_VALUE(total == static_cast<int64_t>(tensor.nbytes()), name, " has ", tensor.nbytes(),
                    " bytes and its splits sum to ", total);
}

// Enqueues on the current stream of the tensors' device; an empty string, or why it failed.
std::string nccl_all_to_all(int64_t handle, const Tensor& input, const Tensor& output,
                            const std::vector<int64_t>& send_bytes, const std::vector<int64_t>& recv_bytes,
                            double timeout_s) {
  const auto communicator = find(handle);
  check_splits(send_bytes, input, communicator->world(), "input");
  check_splits(recv_bytes, output, communicator->world(), "output");
  TORCH_CHECK_VALUE(input.device() == output.device(), "input is on ", input.device(), ", output on ", output.device());
  const char* from = static_cast<const char*>(input.const_data_ptr());
  char* to = static_cast<char*>(output.mutable_data_ptr());
  if (input.device().is_cpu()) {
    TORCH_CHECK(api_or_throw()->takes_host_memory, "NCCL exchanges device memory; these tensors are on the CPU");
    return communicator->exchange(from, to, send_bytes, recv_bytes, nullptr, timeout_s);
  }
  const c10::impl::VirtualGuardImpl device(input.device().type());
  const c10::Stream stream = device.getStream(input.device());
  std::string problem = communicator->exchange(from, to, send_bytes, recv_bytes, stream.native_handle(), timeout_s);
  if (problem.empty()) {
    auto event = std::make_shared<c10::Event>(input.device().type());
    event->record(stream);
    communicator->watch([event] { return event->query(); }, timeout_s);
  }
  return problem;
}

void nccl_abort(int64_t handle, const std::string& reason) { find(handle)->abort(reason); }

void nccl_close(int64_t handle) {
  std::shared_ptr<NcclAllToAll> last;  // destroyed after the lock is released: its watchdog may be at work
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(handle);
  if (found == registry().end()) return;
  last = std::move(found->second);
  registry().erase(found);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_samoe, m) {
  m.def("nccl_problem() -> str", nccl_problem);
  m.def("nccl_library() -> str", nccl_library);
  m.def("nccl_unique_id() -> int[]", nccl_unique_id);
  m.def("nccl_create(int rank, int world) -> int", nccl_create);
  m.def("nccl_connect(int handle, int[] unique_id, float timeout_s) -> str", nccl_connect);
  m.def(
      "nccl_all_to_all(int handle, Tensor input, Tensor(a!) output, int[] send_bytes, int[] recv_bytes,"
      " float timeout_s) -> str");
  m.def("nccl_abort(int handle, str reason) -> ()", nccl_abort);
  m.def("nccl_close(int handle) -> ()", nccl_close);
}

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) { m.impl("nccl_all_to_all", nccl_all_to_all); }
TORCH_LIBRARY_IMPL(megatron_samoe, CUDA, m) { m.impl("nccl_all_to_all", nccl_all_to_all); }
