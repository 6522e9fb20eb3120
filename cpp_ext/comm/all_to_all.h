// The uneven all-to-all of one group of ranks, whatever carries it: shared memory (shm_all_to_all.h) or NCCL
// (nccl_all_to_all.h).
//
// The communicators of a process fail together: a rank that has lost one exchange is lost to its peers in all, so it must
// not sit in another until that one's own time-out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace samoe {
namespace comm {

enum class Progress { done, pending, failed };

// A rank's part of a buffer, in bytes.
struct Part {
  int64_t offset, bytes;
};

class AllToAll {
 public:
  // timeout_s: longest wait for another rank, in a connection or an exchange.
  AllToAll(int rank, int world, double timeout_s);
  virtual ~AllToAll() = default;
  AllToAll(const AllToAll&) = delete;
  AllToAll& operator=(const AllToAll&) = delete;

  // What the other ranks must know of this one to connect; the caller brings every rank's to all, in rank order.
  virtual std::string address() const = 0;
  // Begins to connect; finish(0) waits for it. Returns an empty string, or why it cannot begin.
  virtual std::string connect(const std::vector<std::string>& addresses) = 0;
  // Begins an exchange: send[d] of input goes to rank d, recv[s] of output comes from rank s. The memory must stay
  // until finish() returns something other than pending. Returns an empty string, or why it cannot begin.
  virtual std::string start(const char* input, char* output, const std::vector<Part>& send,
                            const std::vector<Part>& recv) = 0;
  // The number of the exchange that was started last; the first is 1.
  virtual int64_t last_started() const = 0;
  // Works on an exchange, or waits for it, for up to `seconds`. done: the output may be read by what the caller does
  // next on its device. failed: error() says why, and the communicator stays unusable.
  virtual Progress finish(int64_t exchange, double seconds) = 0;
  // Gives up; the first reason is what error() says. Any thread, any number of times.
  virtual void abort(const std::string& reason) = 0;
  virtual void close() = 0;
  virtual std::string last_error() = 0;

  int rank() const { return rank_; }
  int world() const { return world_; }
  double timeout_s() const { return timeout_s_; }

 protected:
  // Says that this communicator failed. The others that exist now find it by lost_elsewhere() in their waits.
  void tell_process(const std::string& reason);
  // Why another communicator of this process failed since this one was made, or an empty string.
  std::string lost_elsewhere() const;

  const int rank_, world_;
  const double timeout_s_;

 private:
  const int64_t failures_before_;
};

}  // namespace comm
}  // namespace samoe
