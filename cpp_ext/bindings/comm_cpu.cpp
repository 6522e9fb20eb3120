// The shared-memory all-to-all as ops on handles. Python owns the life of a communicator; see ops/shm_communicator.py.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../comm/shm_all_to_all.h"

namespace {

using at::Tensor;
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

void check_splits(const std::vector<int64_t>& bytes, const Tensor& tensor, const char* name) {
  int64_t total = 0;
  for (const int64_t part : bytes) {
    TORCH_CHECK_VALUE(part >= 0, name, " has a negative split of ", part, " bytes");
    total += part;
  }
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), name, " is not a contiguous CPU tensor");
  TORCH_CHECK_VALUE(total == static_cast<int64_t>(tensor.nbytes()), name, " has ", tensor.nbytes(),
                    " bytes and its splits sum to ", total);
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
                           const std::vector<int64_t>& send_bytes, const std::vector<int64_t>& recv_bytes,
                           double seconds, double timeout_s) {
  const auto communicator = find(handle);
  TORCH_CHECK_VALUE(
      static_cast<int>(send_bytes.size()) == communicator->world() && send_bytes.size() == recv_bytes.size(),
      send_bytes.size(), " and ", recv_bytes.size(), " splits for ", communicator->world(), " ranks");
  check_splits(send_bytes, input, "input");
  check_splits(recv_bytes, output, "output");
  const std::string problem =
      communicator->start(static_cast<const char*>(input.const_data_ptr()),
                          static_cast<char*>(output.mutable_data_ptr()), send_bytes, recv_bytes);
  return problem.empty() ? shm_run(handle, seconds, timeout_s) : problem;
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
      "shm_all_to_all(int handle, Tensor input, Tensor(a!) output, int[] send_bytes, int[] recv_bytes, float seconds,"
      " float timeout_s) -> str");
  m.def("shm_run(int handle, float seconds, float timeout_s) -> str", shm_run);
  m.def("shm_abort(int handle, str reason) -> ()", shm_abort);
  m.def("shm_close(int handle) -> ()", shm_close);
}

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) { m.impl("shm_all_to_all", shm_all_to_all); }
