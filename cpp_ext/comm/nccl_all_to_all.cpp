#include "nccl_all_to_all.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

#include "nccl_wait.h"

namespace samoe {
namespace comm {
namespace {

// The library of the tests has no events: it counts the groups of calls that it has finished.
class HostMark : public Mark {
 public:
  HostMark(const NcclApi* api, NcclHandle handle, int64_t groups) : api_(api), handle_(handle), groups_(groups) {}
  bool reached() override { return api_->host_finished(handle_) >= groups_; }
  bool lead_caller() override { return reached(); }

 private:
  const NcclApi* api_;
  NcclHandle handle_;
  int64_t groups_;
};

}  // namespace

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
  if (digits.size() != 2 * sizeof id.internal) return fail("ncclGetUniqueId fails on the first rank");
  for (size_t i = 0; i < sizeof id.internal; ++i)
    id.internal[i] = static_cast<char>(std::stoi(digits.substr(2 * i, 2), nullptr, 16));
  has_all_to_all_ = true;
  for (const std::string& address : addresses) has_all_to_all_ &= address.substr(0, 1) == "1";
  NcclConfig config = nonblocking_config();
  const int result = api_->comm_init_rank_config(&handle_, world_, id, rank_, &config);
  if (!accepted(result)) {
    handle_ = nullptr;
    return fail(explain(result, "ncclCommInitRankConfig"));
  }
  enqueueing_ = true;
  enqueueing_what_ = "ncclCommInitRankConfig";
  enqueueing_deadline_ = deadline();
  watchdog_ = std::thread([this] { look_after(); });
  return "";
}

std::unique_ptr<Mark> NcclAllToAll::mark() {
  return queue_ != nullptr ? queue_->mark() : std::make_unique<HostMark>(api_, handle_, groups_);
}

// Asks NCCL how it is: a call that it works on has come to its end when its state is no longer "in progress".
void NcclAllToAll::poll() {
  if (handle_ == nullptr) return;
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

// Waits until NCCL takes the next call.
std::string NcclAllToAll::settle() {
  for (int looks = 0;; pause(&looks)) {
    poll();
    if (handle_ == nullptr) return error_;
    if (!enqueueing_) return "";
    if (abort_asked_) return fail(enqueueing_what_ + " was given up by this rank");
  }
}

// Gives NCCL a group of calls; returns an empty string, or why it failed.
template <typename Calls>
std::string NcclAllToAll::enqueue(const std::string& what, const Calls& calls) {
  int result = api_->group_start();
  if (result != kNcclSuccess) return fail(explain(result, "ncclGroupStart"));
  std::string problem = calls();
  // A group that was opened is closed even after an error: an open group would swallow the thread's next calls.
  result = api_->group_end();
  if (problem.empty() && !accepted(result)) problem = explain(result, "ncclGroupEnd");
  if (!problem.empty()) return fail(problem);
  ++groups_;
  enqueueing_ = true;
  enqueueing_what_ = what;
  enqueueing_deadline_ = deadline();
  return "";
}

// Begins the next exchange in the exchange's stream, or says why it cannot begin.
std::string NcclAllToAll::may_start() {
  if (getpid() != owner_pid_) return "the communicator belongs to the process that made it, not to its fork";
  if (handle_ == nullptr) return error_.empty() ? "the communicator is not connected" : error_;
  const std::string problem = settle();
  if (!problem.empty()) return problem;
  ++operation_;
  if (queue_ != nullptr) queue_->follow_caller();
  return "";
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
  Lock lock(mutex_);
  std::string problem = may_start();
  if (!problem.empty()) return problem;
  const std::string what = "ncclAlltoAll of " + std::to_string(bytes) + " bytes for each rank";
  problem = enqueue(what, [&] {
    void* stream = queue_ != nullptr ? queue_->stream() : nullptr;
    const int result = api_->all_to_all(input, output, static_cast<size_t>(bytes), kNcclUint8, handle_, stream);
    return accepted(result) ? "" : explain(result, what);
  });
  if (problem.empty()) problem = settle();
  if (problem.empty()) pending_.push_back({operation_, mark(), deadline(), what});
  return problem;
}

std::string NcclAllToAll::start_hops(const std::vector<Hop>& hops) {
  Lock lock(mutex_);
  std::string problem = may_start();
  std::string what;
  for (const Hop& hop : hops) {
    if (!problem.empty()) return problem;
    int64_t sent = 0, received = 0;
    for (const Message& message : hop.sends) sent += message.bytes;
    for (const Message& message : hop.receives) received += message.bytes;
    if (sent + received == 0) continue;
    what = "all-to-all of " + std::to_string(sent) + " bytes sent and " + std::to_string(received) + " received";
    problem = enqueue(what, [&]() -> std::string {
      void* stream = queue_ != nullptr ? queue_->stream() : nullptr;
      for (const Message& message : hop.sends) {
        if (message.bytes == 0) continue;
        const int result = api_->send(message.data, static_cast<size_t>(message.bytes), kNcclUint8, message.peer,
                                      handle_, stream);
        if (!accepted(result)) {
          return explain(result, "ncclSend of " + std::to_string(message.bytes) + " bytes to rank " +
                                     std::to_string(message.peer));
        }
      }
      for (const Message& message : hop.receives) {
        if (message.bytes == 0) continue;
        const int result = api_->recv(message.data, static_cast<size_t>(message.bytes), kNcclUint8, message.peer,
                                      handle_, stream);
        if (!accepted(result)) {
          return explain(result, "ncclRecv of " + std::to_string(message.bytes) + " bytes from rank " +
                                     std::to_string(message.peer));
        }
      }
      return "";
    });
    if (problem.empty()) problem = settle();
  }
  if (problem.empty()) pending_.push_back({operation_, mark(), deadline(), what});
  return problem;
}

Progress NcclAllToAll::finish(int64_t exchange, double seconds) {
  const auto until = Clock::now() + duration(seconds);
  for (int looks = 0;; pause(&looks)) {
    {
      Lock lock(mutex_);
      poll();
      if (!error_.empty()) return Progress::failed;
      if (!enqueueing_) {
        // An exchange that is not among those under way has been done.
        bool led = true;
        for (Pending& pending : pending_) {
          if (pending.exchange == exchange) led = pending.mark->lead_caller();
        }
        if (led) return Progress::done;
      }
    }
    if (Clock::now() >= until) return Progress::pending;
  }
}

std::string NcclAllToAll::use_staging(char* memory, int64_t bytes) {
  for (int looks = 0;; pause(&looks)) {
    Lock lock(mutex_);
    poll();
    if (!error_.empty()) return error_;
    forget_reached();
    if (enqueueing_ || !pending_.empty()) continue;
    if (api_->comm_register == nullptr) return "";
    if (registration_ != nullptr) api_->comm_deregister(handle_, std::exchange(registration_, nullptr));
    // What cannot be registered is exchanged all the same.
    if (memory != nullptr && api_->comm_register(handle_, memory, static_cast<size_t>(bytes), &registration_) != 0)
      registration_ = nullptr;
    return "";
  }
}

}  // namespace comm
}  // namespace samoe
