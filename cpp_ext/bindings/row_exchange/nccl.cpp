// The NCCL all-to-all: its making and its exchanges in two hops. CUDA's events come from the runtime that torch has
// loaded, so the same file serves a CPU torch and a CUDA torch.

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../../comm/cuda_queue.h"
#include "communicators.h"

namespace {

using samoe::Communicator;
using samoe::Device;
using samoe::Integers;
using samoe::nbytes;
using samoe::Tensor;
using samoe::comm::cuda_runtime;
using samoe::comm::CudaQueue;
using samoe::comm::CudaRuntime;
using samoe::comm::Hop;
using samoe::comm::Message;
using samoe::comm::nccl_api;
using samoe::comm::NcclAllToAll;
using samoe::comm::NcclApi;

const NcclApi* api_or_throw() {
  std::string why;
  const NcclApi* api = nccl_api(&why);
  SAMOE_CHECK(api != nullptr, why);
  return api;
}

// An empty string where NCCL can be used, else why not.
std::string nccl_problem() {
  std::string why;
  return nccl_api(&why) != nullptr ? "" : why;
}

std::string nccl_library() {
  const NcclApi* api = api_or_throw();
  return api->library + " " + samoe::comm::nccl_version_text(api->version);
}

// stream: of CUDA, by its address, in which the exchanges of the device's memory take place; Python owns it.
int64_t nccl_create(int64_t rank, int64_t world, const Device& device, int64_t stream, double timeout_s) {
  SAMOE_CHECK(world >= 1 && rank >= 0 && rank < world, "rank ", rank, " of ", world);
  const NcclApi* api = api_or_throw();
  std::string why;
  const CudaRuntime* cuda = cuda_runtime(&why);
  SAMOE_CHECK(cuda != nullptr, why);
  auto queue = std::make_unique<CudaQueue>(cuda, device.index(), reinterpret_cast<void*>(stream),
                                           [device] { return samoe::current_stream(device); });
  return samoe::add_communicator({std::make_shared<NcclAllToAll>(api, static_cast<int>(rank), static_cast<int>(world),
                                                                 timeout_s, std::move(queue)),
                                  device});
}

std::tuple<int64_t, std::string> nccl_start_even(int64_t handle, const Tensor& input, const Tensor& output) {
  const Communicator communicator = samoe::find_communicator(handle);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  SAMOE_CHECK(input.device() == communicator.device && output.device() == communicator.device &&
                        input.is_contiguous() && output.is_contiguous(),
                    "input and output must be contiguous, on ", communicator.device);
  SAMOE_CHECK(nbytes(input) == nbytes(output) && nbytes(input) % nccl->world() == 0,
                    "input has ", nbytes(input), " bytes and output ", nbytes(output), ": not the same for each of ",
                    nccl->world(), " ranks");
  return samoe::started(communicator, [&] {
    return nccl->start_even(static_cast<const char*>(input.const_data_ptr()),
                            static_cast<char*>(output.mutable_data_ptr()),
                            nbytes(input) / nccl->world());
  });
}

// Messages from their numbers: peer, whether in the staging memory, first byte, bytes.
std::vector<Message> messages(const std::vector<int64_t>& numbers, const Tensor& own, const Tensor& staging, int world) {
  SAMOE_CHECK(numbers.size() % 4 == 0, "a message has four numbers");
  std::vector<Message> found;
  for (size_t i = 0; i < numbers.size(); i += 4) {
    const int64_t peer = numbers[i], offset = numbers[i + 2], bytes = numbers[i + 3];
    const Tensor& memory = numbers[i + 1] != 0 ? staging : own;
    SAMOE_CHECK(peer >= 0 && peer < world && offset >= 0 && bytes >= 0 &&
                          offset <= nbytes(memory) - bytes,
                      "a message of ", bytes, " bytes at ", offset, " of ", nbytes(memory), " for rank ", peer);
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
    SAMOE_CHECK(tensor->device() == communicator.device && tensor->is_contiguous(),
                      "tensors must be contiguous, on ", communicator.device);
  }
  const int world = nccl->world();
  const Hop first{messages(first_sends, input, staging, world), messages(first_receives, output, staging, world)};
  const Hop second{messages(second_sends, input, staging, world), messages(second_receives, output, staging, world)};
  return samoe::started(communicator, [&] { return nccl->start_hops({first, second}); });
}

// Makes NCCL know memory that exchanges in two hops will use from now on, and forget what they used before, which may
// take a while; a state as of all_to_all_finish.
std::string nccl_use_staging(int64_t handle, const Tensor& staging, double seconds) {
  const samoe::DeviceScope scope(samoe::find_communicator(handle).device);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  return samoe::state_of(*nccl, nccl->use_staging(static_cast<char*>(staging.data_ptr()),
                                           nbytes(staging), seconds));
}

// Waits until NCCL has taken what was started; a state as of all_to_all_finish.
std::string nccl_enqueue(int64_t handle, double seconds) {
  const samoe::DeviceScope scope(samoe::find_communicator(handle).device);
  const auto nccl = samoe::find_transport<NcclAllToAll>(handle);
  return samoe::state_of(*nccl, nccl->finish_enqueueing(seconds));
}

std::tuple<int64_t, int64_t, std::string> nccl_position(int64_t handle) {
  const samoe::DeviceScope scope(samoe::find_communicator(handle).device);
  const samoe::comm::Position position = samoe::find_transport<NcclAllToAll>(handle)->position();
  return {position.started, position.waiting, position.error};
}

}  // namespace

#define SAMOE_FOR_DEVICE(device)                          \
  SAMOE_LIBRARY_IMPL(megatron_samoe, device, m) {         \
    SAMOE_IMPL(m, "nccl_start_even", nccl_start_even);           \
    SAMOE_IMPL(m, "nccl_start_hops", nccl_start_hops);           \
    SAMOE_IMPL(m, "nccl_use_staging", nccl_use_staging);         \
  }
SAMOE_FOR_DEVICE(CPU)
SAMOE_FOR_DEVICE(CUDA)

// Of no tensors.
SAMOE_LIBRARY_IMPL(megatron_samoe, CompositeExplicitAutograd, m) {
  SAMOE_IMPL(m, "nccl_problem", nccl_problem);
  SAMOE_IMPL(m, "nccl_library", nccl_library);
  SAMOE_IMPL(m, "nccl_create", nccl_create);
  SAMOE_IMPL(m, "nccl_enqueue", nccl_enqueue);
  SAMOE_IMPL(m, "nccl_position", nccl_position);
}
