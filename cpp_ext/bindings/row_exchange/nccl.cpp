// The NCCL all-to-all: its making and its exchanges in two hops, for every device. Streams and events come from torch's
// device-generic interface, so the same file serves a CPU torch (with the library of the tests) and a CUDA torch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../../comm/nccl_all_to_all.h"
#include "communicators.h"

namespace {

using at::Tensor;
using samoe::Communicator;
using samoe::comm::Hop;
using samoe::comm::Message;
using samoe::comm::nccl_api;
using samoe::comm::NcclAllToAll;
using samoe::comm::NcclApi;

class EventMark : public samoe::comm::Mark {
 public:
  explicit EventMark(const c10::Stream& stream) : device_(stream.device()), event_(stream.device_type()) {
    event_.record(stream);
  }
  bool reached() override { return event_.query(); }
  bool lead_caller() override {
    event_.block(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    return true;
  }

 private:
  const c10::Device device_;
  c10::Event event_;
};

class TorchQueue : public samoe::comm::DeviceQueue {
 public:
  explicit TorchQueue(const c10::Stream& stream) : stream_(stream) {}
  void* stream() override { return stream_.native_handle(); }
  void follow_caller() override {
    c10::Event event(stream_.device_type());
    event.record(c10::impl::VirtualGuardImpl(stream_.device_type()).getStream(stream_.device()));
    event.block(stream_);
  }
  std::unique_ptr<samoe::comm::Mark> mark() override { return std::make_unique<EventMark>(stream_); }
  void enter_thread() override { c10::impl::VirtualGuardImpl(stream_.device_type()).setDevice(stream_.device()); }

 private:
  const c10::Stream stream_;
};

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
  return api->library + " " + std::to_string(api->version) + (api->host_finished != nullptr ? " (host memory)" : "");
}

int64_t nccl_create(int64_t rank, int64_t world, c10::Device device, double timeout_s) {
  TORCH_CHECK_VALUE(world >= 1 && rank >= 0 && rank < world, "rank ", rank, " of ", world);
  const NcclApi* api = api_or_throw();
  Communicator communicator{nullptr, device, std::nullopt};
  std::unique_ptr<TorchQueue> queue;
  if (device.is_cpu()) {
    TORCH_CHECK(api->host_finished != nullptr, "NCCL exchanges the memory of devices, not of the CPU");
  } else {
    const c10::impl::VirtualGuardImpl guard(device.type());
    if (!device.has_index()) communicator.device = guard.getDevice();
    // Exchanges go before kernels that wait for the same multiprocessors.
    communicator.stream = guard.getStreamFromGlobalPool(communicator.device, /*isHighPriority=*/true);
    queue = std::make_unique<TorchQueue>(*communicator.stream);
  }
  communicator.transport = std::make_shared<NcclAllToAll>(api, static_cast<int>(rank), static_cast<int>(world),
                                                          timeout_s, std::move(queue));
  return samoe::add_communicator(std::move(communicator));
}

std::tuple<int64_t, std::string> nccl_start_even(int64_t handle, const Tensor& input, const Tensor& output) {
  const Communicator communicator = samoe::find_communicator(handle);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  TORCH_CHECK_VALUE(input.device() == communicator.device && output.device() == communicator.device &&
                        input.is_contiguous() && output.is_contiguous(),
                    "input and output must be contiguous, on ", communicator.device);
  TORCH_CHECK_VALUE(input.nbytes() == output.nbytes() && input.nbytes() % static_cast<size_t>(nccl->world()) == 0,
                    "input has ", input.nbytes(), " bytes and output ", output.nbytes(), ": not the same for each of ",
                    nccl->world(), " ranks");
  return samoe::started(communicator, {input, output}, [&] {
    return nccl->start_even(static_cast<const char*>(input.const_data_ptr()),
                            static_cast<char*>(output.mutable_data_ptr()),
                            static_cast<int64_t>(input.nbytes()) / nccl->world());
  });
}

// Messages from their numbers: peer, whether in the staging memory, first byte, bytes.
std::vector<Message> messages(const std::vector<int64_t>& numbers, const Tensor& own, const Tensor& staging, int world) {
  TORCH_CHECK_VALUE(numbers.size() % 4 == 0, "a message has four numbers");
  std::vector<Message> found;
  for (size_t i = 0; i < numbers.size(); i += 4) {
    const int64_t peer = numbers[i], offset = numbers[i + 2], bytes = numbers[i + 3];
    const Tensor& memory = numbers[i + 1] != 0 ? staging : own;
    TORCH_CHECK_VALUE(peer >= 0 && peer < world && offset >= 0 && bytes >= 0 &&
                          offset <= static_cast<int64_t>(memory.nbytes()) - bytes,
                      "a message of ", bytes, " bytes at ", offset, " of ", memory.nbytes(), " for rank ", peer);
    found.push_back({static_cast<int>(peer), static_cast<char*>(memory.data_ptr()) + offset, bytes});
  }
  return found;
}

// An exchange in two hops, the first of which brings `staging` what the second sends.
std::tuple<int64_t, std::string> nccl_start_hops(int64_t handle, const Tensor& input, const Tensor& output,
                                                 const Tensor& staging, const std::vector<int64_t>& first_sends,
                                                 const std::vector<int64_t>& first_receives,
                                                 const std::vector<int64_t>& second_sends,
                                                 const std::vector<int64_t>& second_receives) {
  const Communicator communicator = samoe::find_communicator(handle);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  for (const Tensor* tensor : {&input, &output, &staging}) {
    TORCH_CHECK_VALUE(tensor->device() == communicator.device && tensor->is_contiguous(),
                      "tensors must be contiguous, on ", communicator.device);
  }
  const int world = nccl->world();
  const Hop first{messages(first_sends, input, staging, world), messages(first_receives, output, staging, world)};
  const Hop second{messages(second_sends, input, staging, world), messages(second_receives, output, staging, world)};
  return samoe::started(communicator, {input, output, staging}, [&] { return nccl->start_hops({first, second}); });
}

// Makes NCCL know memory that exchanges in two hops will use from now on, and forget what they used before, which may
// take a while; a state as of all_to_all_finish.
std::string nccl_use_staging(int64_t handle, const Tensor& staging, double seconds) {
  const c10::OptionalDeviceGuard guard(samoe::find_communicator(handle).device);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  return samoe::state_of(*nccl, nccl->use_staging(static_cast<char*>(staging.data_ptr()),
                                           static_cast<int64_t>(staging.nbytes()), seconds));
}

// Waits until NCCL has taken what was started; a state as of all_to_all_finish.
std::string nccl_enqueue(int64_t handle, double seconds) {
  const c10::OptionalDeviceGuard guard(samoe::find_communicator(handle).device);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  return samoe::state_of(*nccl, nccl->finish_enqueueing(seconds));
}

std::tuple<int64_t, int64_t, std::string> nccl_position(int64_t handle) {
  const c10::OptionalDeviceGuard guard(samoe::find_communicator(handle).device);
  const samoe::comm::Position position = samoe::find_transport<NcclAllToAll>(handle)->position();
  return {position.started, position.waiting, position.error};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_samoe, m) {
  m.def("nccl_problem() -> str", nccl_problem);
  m.def("nccl_library() -> str", nccl_library);
  m.def("nccl_create(int rank, int world, Device device, float timeout_s) -> int", nccl_create);
  m.def("nccl_start_even(int handle, Tensor input, Tensor(a!) output) -> (int exchange, str state)");
  m.def(
      "nccl_start_hops(int handle, Tensor input, Tensor(a!) output, Tensor(b!) staging, int[] first_sends,"
      " int[] first_receives, int[] second_sends, int[] second_receives) -> (int exchange, str state)");
  m.def("nccl_use_staging(int handle, Tensor staging, float seconds) -> str");
  m.def("nccl_enqueue(int handle, float seconds) -> str", nccl_enqueue);
  m.def("nccl_position(int handle) -> (int started, int waiting, str error)", nccl_position);
}

#define SAMOE_FOR_DEVICE(device)                          \
  TORCH_LIBRARY_IMPL(megatron_samoe, device, m) {         \
    m.impl("nccl_start_even", nccl_start_even);           \
    m.impl("nccl_start_hops", nccl_start_hops);           \
    m.impl("nccl_use_staging", nccl_use_staging);         \
  }
SAMOE_FOR_DEVICE(CPU)
SAMOE_FOR_DEVICE(CUDA)
