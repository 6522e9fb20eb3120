#include "nccl_all_to_all.h"

#include <unistd.h>

#include <utility>

namespace samoe {
namespace comm {
namespace {

constexpr auto kPoll = std::chrono::microseconds(50);
constexpr auto kLook = std::chrono::milliseconds(100);

using Lock = std::lock_guard<std::recursive_mutex>;

std::chrono::steady_clock::time_point after(double seconds) {
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

NcclAllToAll::NcclAllToAll(const NcclApi* api, int rank, int world)
    : api_(api), rank_(rank), world_(world), owner_pid_(getpid()) {}

NcclAllToAll::~NcclAllToAll() {
  // Abort, not destroy: destroy is collective and would wait for peers that may be gone.
  abort("the communicator is closed");
  stop_ = true;
  if (watchdog_.joinable()) {
    if (getpid() == owner_pid_) {
      watchdog_.join();
    } else {
      watchdog_.detach();  // a fork has the object, not the thread
    }
  }
}

std::string NcclAllToAll::explain(int result, const std::string& call) const {
  std::string text = call + ": " + api_->get_error_string(result);
  const char* detail = api_->get_last_error(nullptr);
  if (detail != nullptr && detail[0] != '\0') text += std::string(" (") + detail + ")";
  return text;
}

std::string NcclAllToAll::fail(const std::string& reason) {
  abort("rank " + std::to_string(rank_) + " of " + std::to_string(world_) + ", exchange " + std::to_string(operation_) +
        ": " + reason);
  return error_;
}

void NcclAllToAll::abort(const std::string& reason) {
  abort_asked_ = true;
  Lock lock(mutex_);
  if (error_.empty()) error_ = reason;
  pending_.clear();
  NcclHandle handle = std::exchange(handle_, nullptr);
  if (handle != nullptr && getpid() == owner_pid_) api_->comm_abort(handle);
}

// A non-blocking call has come to its end when the communicator's state is no longer "in progress".
std::string NcclAllToAll::wait_until_ready(double timeout_s, const std::string& what) {
  const auto deadline = after(timeout_s);
  for (;;) {
    int state = kNcclSuccess;
    const int result = api_->comm_get_async_error(handle_, &state);
    if (result != kNcclSuccess) return explain(result, what);
    if (state == kNcclSuccess) return "";
    if (state != kNcclInProgress) return explain(state, what);
    if (abort_asked_) return what + " was given up by this rank";
    if (Clock::now() >= deadline) {
      return what + " did not end within " + std::to_string(static_cast<int64_t>(timeout_s * 1e3)) + " ms";
    }
    std::this_thread::sleep_for(kPoll);
  }
}

std::string NcclAllToAll::connect(const NcclUniqueId& id, double timeout_s) {
  Lock lock(mutex_);
  NcclConfig config = nonblocking_config();
  const int result = api_->comm_init_rank_config(&handle_, world_, id, rank_, &config);
  if (result != kNcclSuccess && result != kNcclInProgress) {
    handle_ = nullptr;
    return fail(explain(result, "ncclCommInitRankConfig"));
  }
  const std::string problem = wait_until_ready(timeout_s, "ncclCommInitRankConfig");
  if (!problem.empty()) return fail(problem);
  watchdog_ = std::thread([this] { look_after(); });
  return "";
}

std::string NcclAllToAll::exchange(const char* input, char* output, const std::vector<int64_t>& send_bytes,
                                   const std::vector<int64_t>& recv_bytes, void* stream, double timeout_s) {
  Lock lock(mutex_);
  if (getpid() != owner_pid_) return "the communicator belongs to the process that made it, not to its fork";
  if (handle_ == nullptr) return error_.empty() ? "the communicator is not connected" : error_;
  ++operation_;
  int result = api_->group_start();
  std::string problem = result == kNcclSuccess ? "" : explain(result, "ncclGroupStart");
  const bool opened = problem.empty();
  int64_t to = 0, from = 0;
  for (int peer = 0; peer < world_ && problem.empty(); ++peer) {
    const int64_t send = send_bytes[static_cast<size_t>(peer)], recv = recv_bytes[static_cast<size_t>(peer)];
    const std::string at = " rank " + std::to_string(peer);
    if (send > 0) {
      result = api_->send(input + to, static_cast<size_t>(send), kNcclUint8, peer, handle_, stream);
      if (result != kNcclSuccess && result != kNcclInProgress) {
        problem = explain(result, "ncclSend of " + std::to_string(send) + " bytes to" + at);
      }
    }
    if (recv > 0 && problem.empty()) {
      result = api_->recv(output + from, static_cast<size_t>(recv), kNcclUint8, peer, handle_, stream);
      if (result != kNcclSuccess && result != kNcclInProgress) {
        problem = explain(result, "ncclRecv of " + std::to_string(recv) + " bytes from" + at);
      }
    }
    to += send;
    from += recv;
  }
  // A group that was opened is closed even after an error: an open group would swallow the thread's next calls.
  if (opened) {
    result = api_->group_end();
    if (problem.empty() && result != kNcclSuccess && result != kNcclInProgress)
      problem = explain(result, "ncclGroupEnd");
  }
  if (problem.empty()) {
    problem = wait_until_ready(
        timeout_s, "all-to-all of " + std::to_string(to) + " bytes sent and " + std::to_string(from) + " received");
  }
  return problem.empty() ? "" : fail(problem);
}

void NcclAllToAll::watch(std::function<bool()> finished, double timeout_s) {
  Lock lock(mutex_);
  if (handle_ == nullptr) return;
  pending_.push_back({std::move(finished), after(timeout_s), "exchange " + std::to_string(operation_)});
}

void NcclAllToAll::look_after() {
  while (!stop_) {
    std::this_thread::sleep_for(kLook);
    // A call in progress holds the mutex and polls for itself.
    if (!mutex_.try_lock()) continue;
    Lock lock(mutex_, std::adopt_lock);
    if (handle_ == nullptr) return;
    int state = kNcclSuccess;
    const int result = api_->comm_get_async_error(handle_, &state);
    if (result != kNcclSuccess || (state != kNcclSuccess && state != kNcclInProgress)) {
      fail(explain(result != kNcclSuccess ? result : state, "asynchronous error"));
      return;
    }
    while (!pending_.empty() && pending_.front().finished()) pending_.pop_front();
    if (!pending_.empty() && Clock::now() >= pending_.front().deadline) {
      fail("the device has not finished " + pending_.front().what + " in time");
      return;
    }
  }
}

}  // namespace comm
}  // namespace samoe
