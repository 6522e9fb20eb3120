// All-to-all over NCCL on a communicator of its own.
//
// The communicator is non-blocking: connection set-up and enqueueing are polled with a deadline, so that a missing peer
// is an error and not a hang. A watchdog thread looks for asynchronous errors and for exchanges that the device does
// not finish in time, and aborts; the abort also releases a device that waits inside a kernel.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "nccl_api.h"

namespace samoe {
namespace comm {

class NcclAllToAll {
 public:
  NcclAllToAll(const NcclApi* api, int rank, int world);
  ~NcclAllToAll();
  NcclAllToAll(const NcclAllToAll&) = delete;
  NcclAllToAll& operator=(const NcclAllToAll&) = delete;

  // Joins the communicator of `id` on the current device; collective. Returns an empty string, or why it failed.
  std::string connect(const NcclUniqueId& id, double timeout_s);
  // Enqueues an exchange on a stream: send_bytes[d] bytes of input to rank d, recv_bytes[s] bytes of output from rank
  // s. `finished` (may be empty) tells the watchdog whether the device has done it. Returns an empty string, or the
  // reason.
  std::string exchange(const char* input, char* output, const std::vector<int64_t>& send_bytes,
                       const std::vector<int64_t>& recv_bytes, void* stream, double timeout_s);
  void watch(std::function<bool()> finished, double timeout_s);
  // Frees the communicator on this rank; the first reason is what later calls say. Any thread, any number of times.
  void abort(const std::string& reason);
  int world() const { return world_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Pending {
    std::function<bool()> finished;
    Clock::time_point deadline;
    std::string what;
  };

  std::string wait_until_ready(double timeout_s, const std::string& what);
  std::string fail(const std::string& reason);
  void look_after();
  std::string explain(int result, const std::string& call) const;

  const NcclApi* api_;
  const int rank_, world_, owner_pid_;
  NcclHandle handle_ = nullptr;
  int64_t operation_ = 0;
  std::string error_;
  std::deque<Pending> pending_;
  std::recursive_mutex mutex_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> abort_asked_{false};  // lets a call that polls give way to an abort from another thread
  std::thread watchdog_;
};

}  // namespace comm
}  // namespace samoe
