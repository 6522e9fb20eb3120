// The memory that one rank shares with the others of its group on one host.
//
// A segment is an anonymous file (memfd): it has no name to unlink and goes away with its last process, however that
// dies. Peers open it as /proc/PID/fd/FD, which needs one user and one pid namespace; a random mark tells a wrong file.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace samoe {
namespace comm {

constexpr int64_t kSlots = 4;                        // pieces in flight from one rank to another
constexpr int64_t kPieceBytes = int64_t{256} << 10;  // small enough that a piece is read while it is still in the cache

enum class State : uint32_t { open = 0, aborted = 1, closed = 2 };

// Written by the segment's owner, but for the doorbell (rung by peers).
struct alignas(64) Header {
  uint64_t magic, mark;
  uint32_t world;
  alignas(64) std::atomic<uint32_t> doorbell;  // counts events that concern the owner; a futex
  std::atomic<uint32_t> sleeping;              // whether the owner waits in the kernel for the doorbell
  alignas(64) std::atomic<uint32_t> state;
  char reason[448];  // why it was aborted; written before state
};

// How far the ring from the owner to one peer has come, in pieces. Each counter has one writer.
struct Ring {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
};

// A message that lies in the sender's window, from where the receiver copies it. One at a time: the sender publishes
// the next when this one is consumed. Each counter has one writer.
struct Pull {
  alignas(64) std::atomic<uint64_t> published;
  uint64_t operation, message_bytes, place, capacity;  // place and capacity: see shm_window.h
  alignas(64) std::atomic<uint64_t> consumed;
  bool pending() const { return published.load(std::memory_order_acquire) != consumed.load(std::memory_order_acquire); }
};

struct alignas(64) Slot {
  uint64_t operation;      // number of the exchange this piece belongs to
  uint64_t message_bytes;  // of the whole message
  uint64_t piece_bytes;
  alignas(64) char data[kPieceBytes];
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free,
              "atomics must work between processes");

class Segment {
 public:
  Segment() = default;
  ~Segment() { release(); }
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Both return an empty string, or why it failed; the segment is then as it was before.
  std::string create(int world, uint64_t mark);
  std::string open(pid_t pid, int fd, int world, uint64_t mark);
  void release();
  // For ranks that are threads: uses the other's mapping.
  void share(const Segment& other);

  Header& header() const { return *reinterpret_cast<Header*>(base_.get()); }
  Ring& ring(int peer) const;
  Pull& pull(int peer) const;
  Slot& slot(int peer, uint64_t piece) const;
  int fd() const { return fd_; }

 private:
  std::string try_create(int world, uint64_t mark);
  std::string try_open(pid_t pid, int fd, int world, uint64_t mark);
  std::string map(size_t bytes);
  std::shared_ptr<char> base_;  // unmapped with the last who holds it
  int fd_ = -1;
  int world_ = 0;
};

}  // namespace comm
}  // namespace samoe
