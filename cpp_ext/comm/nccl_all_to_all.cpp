#include "nccl_all_to_all.h"

#include <unistd.h>

#include <charconv>
#include <cstdio>
#include <utility>

#include "nccl_wait.h"

namespace samoe {
namespace comm {

NcclAllToAll::NcclAllToAll(const NcclApi* api, int rank, int world, double timeout_s,
                           std::unique_ptr<DeviceQueue> queue)
    : AllToAll(rank, world, timeout_s), api_(api), owner_pid_(getpid()), queue_(std::move(queue)) {
  NcclUniqueId id;
  if (rank != 0 || api_->get_unique_id(&id) != kNcclSuccess) return;
  char digits[3];
  for (const char byte : id.internal) {
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
    id_ += digits;
  }
}

NcclAllToAll::Clock::time_point NcclAllToAll::deadline() const { return Clock::now() + duration(timeout_s_); }

std::string NcclAllToAll::explain(int result, const std::string& call) const {
  std::string text = call + ": " + api_->get_error_string(result);
  const char* detail = api_->get_last_error(nullptr);
  if (detail != nullptr && detail[0] != '\0') text += std::string(" (") + detail + ")";
  return text;
}

std::string NcclAllToAll::last_error() {
  Lock lock(mutex_);
  return error_;
}

std::string NcclAllToAll::address() const { return (api_->all_to_all != nullptr ? "1" : "0") + id_; }

std::string NcclAllToAll::connect(const std::vector<std::string>& addresses) {
  Lock lock(mutex_);
  NcclUniqueId id;
  const std::string digits = addresses.empty() || addresses[0].empty() ? "" : addresses[0].substr(1);
  if (digits.size() != 2 * sizeof id.internal) {
    fail("ncclGetUniqueId fails on the first rank");
    return error_;
  }
  for (size_t i = 0; i < sizeof id.internal; ++i) {
    unsigned char byte = 0;
    std::from_chars(&digits[2 * i], &digits[2 * i] + 2, byte, 16);
    id.internal[i] = static_cast<char>(byte);
  }
  has_all_to_all_ = true;
  for (const std::string& address : addresses) has_all_to_all_ &= address.substr(0, 1) == "1";
  NcclConfig config = nonblocking_config();
  const int result = api_->comm_init_rank_config(&handle_, world_, id, rank_, &config);
  if (!accepted(result)) {
    handle_ = nullptr;
    fail(explain(result, "ncclCommInitRankConfig"));
    return error_;
  }
  enqueueing_ = true;
  enqueueing_what_ = "ncclCommInitRankConfig";
  enqueueing_deadline_ = deadline();
  watchdog_ = std::thread([this] { look_after(); });
  return "";
}

// Asks NCCL how it is: a call that it works on has come to its end when its state is no longer "in progress".
void NcclAllToAll::poll() {
  if (handle_ == nullptr) return;
  if (const std::string why = lost_elsewhere(); !why.empty()) {
    fail(why);
    return;
  }
  int state = kNcclSuccess;
  int result = api_->comm_get_async_error(handle_, &state);
  if (result == kNcclSuccess) result = state;
  if (!accepted(result)) {
    fail(explain(result, enqueueing_ ? enqueueing_what_ : "asynchronous error"));
  } else if (enqueueing_ && state == kNcclSuccess) {
    enqueueing_ = false;
  } else if (enqueueing_ && Clock::now() >= enqueueing_deadline_) {
    fail(enqueueing_what_ + " did not end within " + std::to_string(static_cast<int64_t>(timeout_s_ * 1e3)) + " ms");
  }
}

// Gives NCCL what waits for its turn, as far as it takes it now.
void NcclAllToAll::advance() {
  poll();
  while (handle_ != nullptr && !enqueueing_ && !turns_.empty()) {
    const std::function<void()> turn = std::move(turns_.front());
    turns_.pop_front();
    turn();
    poll();
  }
}

// Gives NCCL a group of calls.
void NcclAllToAll::enqueue(const std::string& what, const std::function<std::string()>& calls) {
  int result = api_->group_start();
  if (result != kNcclSuccess) {
    fail(explain(result, "ncclGroupStart"));
    return;
  }
  std::string problem = calls();
  // A group that was opened is closed even after an error: an open group would swallow the thread's next calls.
  result = api_->group_end();
  if (problem.empty() && !accepted(result)) problem = explain(result, "ncclGroupEnd");
  if (!problem.empty()) {
    fail(problem);
    return;
  }
  enqueueing_ = true;
  enqueueing_what_ = what;
  enqueueing_deadline_ = deadline();
}

// Begins the next exchange, each of whose groups waits for NCCL to have taken the one before; returns an empty string,
// or why it cannot begin.
std::string NcclAllToAll::start_groups(std::vector<CallGroup> groups) {
  if (getpid() != owner_pid_) return "the communicator belongs to the process that made it, not to its fork";
  Lock lock(mutex_);
  if (handle_ == nullptr) return error_.empty() ? "the communicator is not connected" : error_;
  const int64_t exchange = ++operation_;
  queue_->follow_caller();
  const std::string what = groups.empty() ? "empty all-to-all" : groups.back().what;
  for (CallGroup& group : groups)
    turns_.push_back([this, group = std::move(group)] { enqueue(group.what, group.calls); });
  turns_.push_back([this, exchange, what] { pending_.push_back({exchange, queue_->mark(), deadline(), what}); });
  advance();
  return error_;
}

std::string NcclAllToAll::start(const char* input, char* output, const std::vector<Part>& send,
                                const std::vector<Part>& recv) {
  Hop hop;
  for (int peer = 0; peer < world_; ++peer) {
    const Part &out = send[static_cast<size_t>(peer)], &in = recv[static_cast<size_t>(peer)];
    hop.sends.push_back({peer, const_cast<char*>(input) + out.offset, out.bytes});
    hop.receives.push_back({peer, output + in.offset, in.bytes});
  }
  return start_hops({hop});
}

std::string NcclAllToAll::start_even(const char* input, char* output, int64_t bytes) {
  if (!has_all_to_all_ || bytes == 0) {
    std::vector<Part> parts;
    for (int peer = 0; peer < world_; ++peer) parts.push_back({peer * bytes, bytes});
    return start(input, output, parts, parts);
  }
  const std::string what = "ncclAlltoAll of " + std::to_string(bytes) + " bytes for each rank";
  return start_groups({{what, [this, input, output, bytes, what] {
                          const int result = api_->all_to_all(input, output, static_cast<size_t>(bytes), kNcclUint8,
                                                              handle_, queue_->stream());
                          return accepted(result) ? "" : explain(result, what);
                        }}});
}

std::string NcclAllToAll::send_and_receive(const Hop& hop) {
  for (const Message& message : hop.sends) {
    if (message.bytes == 0) continue;
    const int result =
        api_->send(message.data, static_cast<size_t>(message.bytes), kNcclUint8, message.peer, handle_, queue_->stream());
    if (!accepted(result)) {
      return explain(result, "ncclSend of " + std::to_string(message.bytes) + " bytes to rank " +
                                 std::to_string(message.peer));
    }
  }
  for (const Message& message : hop.receives) {
    if (message.bytes == 0) continue;
    const int result =
        api_->recv(message.data, static_cast<size_t>(message.bytes), kNcclUint8, message.peer, handle_, queue_->stream());
    if (!accepted(result)) {
      return explain(result, "ncclRecv of " + std::to_string(message.bytes) + " bytes from rank " +
                                 std::to_string(message.peer));
    }
  }
  return "";
}

std::string NcclAllToAll::start_hops(const std::vector<Hop>& hops) {
  std::vector<CallGroup> groups;
  for (const Hop& hop : hops) {
    int64_t sent = 0, received = 0;
    for (const Message& message : hop.sends) sent += message.bytes;
    for (const Message& message : hop.receives) received += message.bytes;
    if (sent + received == 0) continue;
    groups.push_back({"all-to-all of " + std::to_string(sent) + " bytes sent and " + std::to_string(received) +
                          " received",
                      [this, hop] { return send_and_receive(hop); }});
  }
  return start_groups(std::move(groups));
}

// Looks until `done`, under the mutex, for up to so many seconds.
template <typename Done>
Progress NcclAllToAll::look_until(double seconds, const Done& done) {
  const auto until = Clock::now() + duration(seconds);
  for (int looks = 0;; pause(&looks)) {
    {
      Lock lock(mutex_);
      advance();
      if (!error_.empty()) return Progress::failed;
      if (!enqueueing_ && turns_.empty() && done()) return Progress::done;
    }
    if (Clock::now() >= until) return Progress::pending;
  }
}

Progress NcclAllToAll::finish_enqueueing(double seconds) {
  return look_until(seconds, [] { return true; });
}

Progress NcclAllToAll::finish(int64_t exchange, double seconds) {
  return look_until(seconds, [&] {
    // An exchange that is not among those under way has been done.
    for (Pending& pending : pending_) {
      if (pending.exchange == exchange) pending.mark->lead_caller();
    }
    return true;
  });
}

Progress NcclAllToAll::use_staging(char* memory, int64_t bytes, double seconds) {
  return look_until(seconds, [&] {
    forget_reached();
    if (!pending_.empty()) return false;
    if (api_->comm_register == nullptr) return true;
    if (registration_ != nullptr) api_->comm_deregister(handle_, std::exchange(registration_, nullptr));
    // What cannot be registered is exchanged all the same.
    if (memory != nullptr && api_->comm_register(handle_, memory, static_cast<size_t>(bytes), &registration_) != 0)
      registration_ = nullptr;
    return true;
  });
}

Position NcclAllToAll::position() {
  Lock lock(mutex_);
  const int64_t started = operation_;
  if (!pending_.empty()) return {started, pending_.front().exchange, error_};
  return {started, enqueueing_ || !turns_.empty() ? started : -1, error_};
}

}  // namespace comm
}  // namespace samoe
