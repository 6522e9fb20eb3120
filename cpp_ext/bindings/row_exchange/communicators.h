// The process's communicators, which Python names by a number; see row_exchange/communicator.py.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "../../comm/all_to_all.h"
#include "../device.h"

namespace samoe {

// A communicator, and the device whose memory it exchanges.
struct Communicator {
  std::shared_ptr<comm::AllToAll> transport;
  Device device;
};

int64_t add_communicator(Communicator communicator);
// ValueError where nothing has the number.
Communicator find_communicator(int64_t handle);

// What the ops say of an exchange: an empty string for done, "pending", or the reason of the failure.
inline std::string state_of(comm::AllToAll& transport, comm::Progress progress) {
  if (progress == comm::Progress::failed) return transport.last_error();
  return progress == comm::Progress::pending ? "pending" : "";
}

// The number of an exchange that `start`, which returns a problem, began on the communicator's device, and its state.
template <typename Start>
std::tuple<int64_t, std::string> started(const Communicator& communicator, Start start) {
  const DeviceScope scope(communicator.device);
  const std::string problem = start();
  return {communicator.transport->last_started(), problem.empty() ? "pending" : problem};
}

// The transport of a number, which has to be of a kind.
template <typename Transport>
std::shared_ptr<Transport> find_transport(int64_t handle) {
  auto transport = std::dynamic_pointer_cast<Transport>(find_communicator(handle).transport);
  SAMOE_CHECK(transport != nullptr, "communicator ", handle, " goes through something else");
  return transport;
}

}  // namespace samoe
