// All-to-all over NCCL on a communicator and a stream of its own.
//
// An exchange waits for what the caller's stream has to do before it, and what the caller enqueues after finish() waits
// for the exchange; between the two the caller's stream computes. The communicator is non-blocking: connection set-up
// and enqueueing are polled with a deadline, so that a missing peer is an error and not a hang. A watchdog thread looks
// for asynchronous errors and for exchanges that the device does not finish in time, and aborts; the abort also releases
// a device that waits inside a kernel.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "all_to_all.h"
#include "nccl_api.h"

namespace samoe {
namespace comm {

// A point in the exchange's stream.
class Mark {
 public:
  virtual ~Mark() = default;
  virtual bool reached() = 0;
  // What the caller's stream does from now on waits for the mark.
  virtual void lead_caller() = 0;
};

// The stream in which a device does exchanges; cuda_queue.h has CUDA's.
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;
  virtual void* stream() = 0;
  // What is enqueued from now on waits for what the caller's stream has been given so far.
  virtual void follow_caller() = 0;
  virtual std::unique_ptr<Mark> mark() = 0;
  // Prepares a new thread, which begins on the first device, for questions about the stream.
  virtual void enter_thread() {}
};

// Bytes that travel between this rank and another, which may be itself; `data` is written where they arrive.
struct Message {
  int peer;
  char* data;
  int64_t bytes;
};

// Messages that travel at the same time.
struct Hop {
  std::vector<Message> sends, receives;
};

// How far a communicator is: the exchange that was started last, the one that is waited for (0 while it connects, -1 for
// none), and why it failed.
struct Position {
  int64_t started, waiting;
  std::string error;
};

class NcclAllToAll : public AllToAll {
 public:
  NcclAllToAll(const NcclApi* api, int rank, int world, double timeout_s, std::unique_ptr<DeviceQueue> queue);
  ~NcclAllToAll() override;

  std::string address() const override;
  // Joins on the current device.
  std::string connect(const std::vector<std::string>& addresses) override;
  // Several exchanges may be on their way; the device does them in the order of their start. NCCL takes an exchange as
  // soon as it has taken the one before, which finish_enqueueing waits for: the first with a peer connects to it.
  std::string start(const char* input, char* output, const std::vector<Part>& send,
                    const std::vector<Part>& recv) override;
  // An exchange of which every rank knows that all its parts have so many bytes: ncclAlltoAll where all ranks have it.
  std::string start_even(const char* input, char* output, int64_t bytes);
  // An exchange in several hops, each of which sends what the one before it brought.
  std::string start_hops(const std::vector<Hop>& hops);
  Progress finish_enqueueing(double seconds);
  int64_t last_started() const override { return operation_; }
  Progress finish(int64_t exchange, double seconds) override;
  // Registers the memory between hops with NCCL, where that can be done, in place of the memory before it, whose
  // exchanges it waits for.
  Progress use_staging(char* memory, int64_t bytes, double seconds);
  Position position();  // as the watchdog saw it last, a tenth of a second ago at most
  // Frees the communicator on this rank alone: the others hear of it from NCCL or from their time-out.
  void abort(const std::string& reason) override;
  // Frees the communicator with its peers after what is under way has ended; aborts it where that takes some seconds.
  void close() override;
  std::string last_error() override;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::lock_guard<std::recursive_mutex>;
  struct Pending {
    int64_t exchange;
    std::unique_ptr<Mark> mark;
    Clock::time_point deadline;
    std::string what;
  };

  // Calls that NCCL is given together.
  struct CallGroup {
    std::string what;
    std::function<std::string()> calls;  // returns an empty string, or why one failed
  };

  std::string start_groups(std::vector<CallGroup> groups);
  std::string send_and_receive(const Hop& hop);
  void enqueue(const std::string& what, const std::function<std::string()>& calls);
  void advance();
  void poll();
  template <typename Done>
  Progress look_until(double seconds, const Done& done);
  void fail(const std::string& reason);
  void give_up(const std::string& reason);
  void bury();
  bool retire(NcclHandle handle, Clock::time_point until);
  void look_after();
  void watch();
  void forget_reached();
  std::string explain(int result, const std::string& call) const;
  Clock::time_point deadline() const;

  const NcclApi* api_;
  const int owner_pid_;
  const std::unique_ptr<DeviceQueue> queue_;
  std::string id_;  // of the first rank: NCCL's unique id, in hexadecimal digits
  bool has_all_to_all_ = false;
  NcclHandle handle_ = nullptr;
  NcclHandle doomed_ = nullptr;  // given up, not yet aborted
  std::atomic<int64_t> operation_{0};
  // The call that NCCL is still working on: what it is, and until when.
  bool enqueueing_ = false;
  std::string enqueueing_what_;
  Clock::time_point enqueueing_deadline_;
  std::deque<std::function<void()>> turns_;  // what follows it: groups of calls, and marks behind them
  void* registration_ = nullptr;
  std::string error_;
  std::deque<Pending> pending_;  // exchanges that the device has been given, in their order
  std::recursive_mutex mutex_;
  std::atomic<bool> stop_{false};
  std::thread watchdog_;
};

}  // namespace comm
}  // namespace samoe
