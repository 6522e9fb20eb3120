// The one-copy path of the all-to-all: messages that lie in the sender's window.
#include <algorithm>

#include "shm_all_to_all.h"

namespace samoe {
namespace comm {
namespace {

constexpr uint64_t kPullBytes = 1 << 20;  // copied from a window before other peers are looked at

}  // namespace

// Whether every peer has read what was published from a buffer of the window.
bool ShmAllToAll::window_is_read(int buffer) const {
  const Segment& own = peers_[static_cast<size_t>(rank_)].segment;
  for (int r = 0; r < world_; ++r) {
    const Pull& pull = own.pull(r);
    if (r != rank_ && pull.pending() && buffer_of(pull.place) == buffer) return false;
  }
  return true;
}

Progress ShmAllToAll::stage(int64_t bytes, double seconds, double timeout_s, std::shared_ptr<Mapping>* memory,
                            std::string* why) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_.empty()) return Progress::failed;
  Peer& self = peers_[static_cast<size_t>(rank_)];
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  if (!staging_) last_progress_ = last_look_ = Clock::now();
  staging_ = true;
  for (;;) {
    const uint32_t seen = self.segment.header().doorbell.load(std::memory_order_acquire);
    // The buffer that is still in the cache, if peers are done with it, else the other.
    if (window_is_read(buffer_)) break;
    if (window_is_read(1 - buffer_)) {
      buffer_ = 1 - buffer_;
      break;
    }
    if (!peers_are_well(timeout_s)) return Progress::failed;
    if (Clock::now() >= until) return Progress::pending;
    wait(seen, until);
  }
  staging_ = false;
  *why = self.window.grow(buffer_, static_cast<uint64_t>(bytes));
  if (!why->empty()) return Progress::failed;
  *memory = self.window.buffer(buffer_);
  return Progress::done;
}

// Tells a peer where its message lies in the window. From then on it is the peer's to finish.
bool ShmAllToAll::publish(int to) {
  Peer& peer = peers_[static_cast<size_t>(to)];
  Pull& pull = peers_[static_cast<size_t>(rank_)].segment.pull(to);
  if (pull.pending()) return false;
  pull.operation = operation_;
  pull.message_bytes = peer.send_bytes;
  pull.place = staged_place_ + static_cast<uint64_t>(peer.input - staged_input_);
  pull.capacity = staged_capacity_;
  peer.sent = peer.send_bytes;
  pull.published.fetch_add(1, std::memory_order_release);
  ring_doorbell(to);
  return true;
}

bool ShmAllToAll::pull_piece(int from, bool streamed) {
  Peer& peer = peers_[static_cast<size_t>(from)];
  Pull& pull = peer.segment.pull(rank_);
  if (disagrees(from, pull.message_bytes, pull.operation)) return false;
  if (peer.pulled == nullptr) {
    const std::string problem = peer.window.read(pull.place, pull.capacity, &peer.pulled);
    if (!problem.empty()) return fail("the window of rank " + std::to_string(from) + ": " + problem);
  }
  const uint64_t bytes = std::min<uint64_t>(kPullBytes, peer.recv_bytes - peer.received);
  copy(peer.pulled + peer.received, peer.output + peer.received, bytes, streamed);
  peer.received += bytes;
  if (peer.received == peer.recv_bytes) {
    pull.consumed.fetch_add(1, std::memory_order_release);
    ring_doorbell(from);
  }
  return true;
}

}  // namespace comm
}  // namespace samoe
