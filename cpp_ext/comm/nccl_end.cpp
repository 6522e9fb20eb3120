// How an NCCL all-to-all ends: errors, aborts, the watchdog that finds them, and close.
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <future>
#include <utility>

#include "nccl_all_to_all.h"
#include "nccl_wait.h"

namespace samoe {
namespace comm {
namespace {

constexpr auto kLook = std::chrono::milliseconds(100);
constexpr double kCloseSeconds = 5;
constexpr char kClosed[] = "the communicator is closed";

}  // namespace

NcclAllToAll::~NcclAllToAll() {
  if (getpid() != owner_pid_) {
    // A fork has the object, but neither the thread, of which not even the stack may be left, nor the device's events.
    new std::thread(std::move(watchdog_));
    new std::deque<Pending>(std::move(pending_));
    return;
  }
  abort(kClosed);
  stop_ = true;
  if (watchdog_.joinable()) watchdog_.join();
}

// Callers hold the mutex; the watchdog aborts.
void NcclAllToAll::fail(const std::string& reason) {
  give_up("rank " + std::to_string(rank_) + " of " + std::to_string(world_) + ", exchange " +
          std::to_string(operation_) + ": " + reason);
}

void NcclAllToAll::give_up(const std::string& reason) {
  if (error_.empty()) {
    error_ = reason;
    if (reason != kClosed) tell_process(reason);
  }
  turns_.clear();
  pending_.clear();
  enqueueing_ = false;
  if (handle_ != nullptr) doomed_ = std::exchange(handle_, nullptr);
}

// Not under the mutex: an abort may wait for the device, and whoever asks for the error must not wait with it.
void NcclAllToAll::bury() {
  NcclHandle handle;
  {
    Lock lock(mutex_);
    handle = std::exchange(doomed_, nullptr);
  }
  if (handle != nullptr) api_->comm_abort(handle);
}

void NcclAllToAll::abort(const std::string& reason) {
  if (getpid() != owner_pid_) return;  // a fork has neither the device nor, perhaps, the mutex
  {
    Lock lock(mutex_);
    give_up(reason);
  }
  bury();
}

// Frees a communicator that has nothing to do any more, which takes its peers: NCCL finalizes when all of them do.
// Returns false where that fails or takes too long; the communicator is still there then.
bool NcclAllToAll::retire(NcclHandle handle, Clock::time_point until) {
  if (api_->comm_finalize == nullptr || !accepted(api_->comm_finalize(handle))) return false;
  int state = kNcclInProgress;
  for (int looks = 0; state == kNcclInProgress; pause(&looks)) {
    if (Clock::now() >= until || api_->comm_get_async_error(handle, &state) != kNcclSuccess) return false;
  }
  if (state != kNcclSuccess) return false;
  // NCCL's manual calls it collective within a node, and it has no deadline: one that hangs is left to its thread.
  std::packaged_task<int(NcclHandle)> destroy(api_->comm_destroy);
  std::future<int> ended = destroy.get_future();
  std::thread(std::move(destroy), handle).detach();
  ended.wait_until(until);
  return true;
}

void NcclAllToAll::close() {
  if (getpid() != owner_pid_) return;
  const auto until = Clock::now() + std::min(duration(timeout_s_), duration(kCloseSeconds));
  NcclHandle leaving = nullptr;
  try {
    // An abort stops rows that are still on their way, this rank's own and those that others wait for.
    for (int looks = 0; Clock::now() < until; pause(&looks)) {
      Lock lock(mutex_);
      advance();
      forget_reached();
      if (!error_.empty()) break;
      if (enqueueing_ || !turns_.empty() || !pending_.empty()) continue;
      if (registration_ != nullptr) api_->comm_deregister(handle_, std::exchange(registration_, nullptr));
      leaving = std::exchange(handle_, nullptr);
      error_ = kClosed;
      break;
    }
  } catch (const std::exception&) {
    // The device failed; nothing more will end.
  }
  if (leaving != nullptr && !retire(leaving, until)) api_->comm_abort(leaving);
  abort(kClosed);
}

void NcclAllToAll::forget_reached() {
  while (!pending_.empty() && pending_.front().mark->reached()) pending_.pop_front();
}

void NcclAllToAll::look_after() {
  try {
    queue_->enter_thread();
    watch();
  } catch (const std::exception& failure) {
    // A device that failed throws at every question. What it was given last is left to it.
    Lock lock(mutex_);
    if (!error_.empty()) return;
    error_ = std::string("the device failed: ") + failure.what();
    tell_process(error_);
  }
}

void NcclAllToAll::watch() {
  while (!stop_) {
    std::this_thread::sleep_for(kLook);
    bool ended;
    {
      Lock lock(mutex_);
      poll();
      forget_reached();
      if (!pending_.empty() && Clock::now() >= pending_.front().deadline) {
        fail("the device did not end the " + pending_.front().what + ", exchange " +
             std::to_string(pending_.front().exchange) + ", within " +
             std::to_string(static_cast<int64_t>(timeout_s_ * 1e3)) + " ms");
      }
      ended = handle_ == nullptr;
    }
    if (ended) return bury();
  }
}

}  // namespace comm
}  // namespace samoe
