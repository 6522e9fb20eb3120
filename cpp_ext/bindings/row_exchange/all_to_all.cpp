// What all communicators do, as ops on handles. Python owns their life; see row_exchange/communicator.py.
#include "communicators.h"

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace samoe {
namespace {

using comm::Part;

std::mutex registry_mutex;

std::map<int64_t, Communicator>& registry() {
  // Never destroyed: at exit NCCL's library and the device may be gone before it.
  static auto* communicators = new std::map<int64_t, Communicator>();
  return *communicators;
}

// A rank's parts of a tensor: at the given byte offsets, or one after the other and together all of it.
std::vector<Part> parts_of(const std::vector<int64_t>& offsets, const std::vector<int64_t>& bytes, const Tensor& tensor,
                           const Communicator& communicator, const char* name) {
  SAMOE_CHECK(static_cast<int>(bytes.size()) == communicator.transport->world() &&
                        (offsets.empty() || offsets.size() == bytes.size()),
                    name, " has ", bytes.size(), " splits for ", communicator.transport->world(), " ranks");
  SAMOE_CHECK(tensor.device() == communicator.device, name, " is on ", tensor.device(),
                    " and the communicator on ", communicator.device);
  SAMOE_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  const int64_t size = nbytes(tensor);
  std::vector<Part> parts;
  int64_t end = 0;
  for (size_t r = 0; r < bytes.size(); ++r) {
    SAMOE_CHECK(bytes[r] >= 0, name, " has a negative split of ", bytes[r], " bytes");
    const int64_t offset = offsets.empty() ? end : offsets[r];
    SAMOE_CHECK(offset >= 0 && offset <= size - bytes[r], name, " has ", size, " bytes and a part of ", bytes[r],
                      " at ", offset);
    parts.push_back({offset, bytes[r]});
    end = offset + bytes[r];
  }
  SAMOE_CHECK(!offsets.empty() || end == size, name, " has ", size, " bytes and its splits sum to ", end);
  return parts;
}

std::string all_to_all_address(int64_t handle) { return find_communicator(handle).transport->address(); }

std::string all_to_all_connect(int64_t handle, const std::vector<std::string>& addresses) {
  const Communicator communicator = find_communicator(handle);
  SAMOE_CHECK(static_cast<int>(addresses.size()) == communicator.transport->world(), addresses.size(),
                    " addresses for ", communicator.transport->world(), " ranks");
  const DeviceScope scope(communicator.device);
  return communicator.transport->connect(addresses);
}

std::string all_to_all_finish(int64_t handle, int64_t exchange, double seconds) {
  const Communicator communicator = find_communicator(handle);
  const DeviceScope scope(communicator.device);
  return state_of(*communicator.transport, communicator.transport->finish(exchange, seconds));
}

// Starts an exchange and returns its number and its state after so many seconds, as all_to_all_finish.
std::tuple<int64_t, std::string> all_to_all_start(int64_t handle, const Tensor& input, const Tensor& output,
                                                  const std::vector<int64_t>& send_offsets,
                                                  const std::vector<int64_t>& send_bytes,
                                                  const std::vector<int64_t>& recv_offsets,
                                                  const std::vector<int64_t>& recv_bytes, double seconds) {
  const Communicator communicator = find_communicator(handle);
  const auto send = parts_of(send_offsets, send_bytes, input, communicator, "input");
  const auto recv = parts_of(recv_offsets, recv_bytes, output, communicator, "output");
  auto result = started(communicator, [&] {
    return communicator.transport->start(static_cast<const char*>(input.const_data_ptr()),
                                         static_cast<char*>(output.mutable_data_ptr()), send, recv);
  });
  auto& [exchange, state] = result;
  if (state == "pending" && seconds > 0) state = all_to_all_finish(handle, exchange, seconds);
  return result;
}

void all_to_all_abort(int64_t handle, const std::string& reason) { find_communicator(handle).transport->abort(reason); }

void all_to_all_close(int64_t handle) {
  std::shared_ptr<comm::AllToAll> last;  // ends after the lock is released: its watchdog may be at work
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = registry().find(handle);
    if (found == registry().end()) return;
    last = std::move(found->second.transport);
    registry().erase(found);
  }
  last->close();
}

}  // namespace

int64_t add_communicator(Communicator communicator) {
  static int64_t next_handle = 0;
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry().emplace(++next_handle, std::move(communicator));
  return next_handle;
}

Communicator find_communicator(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(handle);
  SAMOE_CHECK(found != registry().end(), "no communicator has the handle ", handle, "; it may be closed");
  return found->second;
}

}  // namespace samoe

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) { SAMOE_IMPL(m, "all_to_all_start", samoe::all_to_all_start); }
SAMOE_LIBRARY_IMPL(megatron_samoe, CUDA, m) { SAMOE_IMPL(m, "all_to_all_start", samoe::all_to_all_start); }

// Of no tensors.
SAMOE_LIBRARY_IMPL(megatron_samoe, CompositeExplicitAutograd, m) {
  SAMOE_IMPL(m, "all_to_all_address", samoe::all_to_all_address);
  SAMOE_IMPL(m, "all_to_all_connect", samoe::all_to_all_connect);
  SAMOE_IMPL(m, "all_to_all_finish", samoe::all_to_all_finish);
  SAMOE_IMPL(m, "all_to_all_abort", samoe::all_to_all_abort);
  SAMOE_IMPL(m, "all_to_all_close", samoe::all_to_all_close);
}
