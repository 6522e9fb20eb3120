#include "shm_all_to_all.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>

#include "../kernels/kernels.h"
#include "shm_wait.h"

namespace samoe {
namespace comm {
namespace {

constexpr double kSliceSeconds = 0.05;      // of a sleep; how late a dead peer is noticed
// What the ranks receive together is written past the cache, which they share, where it would not stay there anyway.
constexpr uint64_t kStreamBytes = 12 << 20;

}  // namespace

ShmAllToAll::ShmAllToAll(int rank, int world, int spins, double timeout_s)
    : AllToAll(rank, world, timeout_s),
      spins_(spins),
      owner_pid_(getpid()),
      peers_(static_cast<size_t>(world)) {
  std::random_device random;
  mark_ = (static_cast<uint64_t>(random()) << 32) | random();
}

ShmAllToAll::~ShmAllToAll() { close(); }

std::string ShmAllToAll::create() {
  Peer& self = peers_[static_cast<size_t>(rank_)];
  const std::string problem = self.segment.create(world_, mark_);
  return problem.empty() ? self.window.create() : problem;
}

std::string ShmAllToAll::address() const {
  const Peer& self = peers_[static_cast<size_t>(rank_)];
  return std::to_string(owner_pid_) + " " + std::to_string(self.segment.fd()) + " " + std::to_string(self.window.fd()) +
         " " + std::to_string(mark_);
}

std::string ShmAllToAll::connect(const std::vector<std::string>& addresses) {
  for (int r = 0; r < world_; ++r) {
    if (r == rank_) continue;
    Peer& peer = peers_[static_cast<size_t>(r)];
    int fd = -1, window_fd = -1;
    unsigned long long mark = 0;
    std::istringstream address(addresses[static_cast<size_t>(r)]);
    if (!(address >> peer.pid >> fd >> window_fd >> mark)) {
      return "rank " + std::to_string(r) + " has no segment";
    }
    // The pidfd comes first: once the mark is verified it is known to mean the peer, not a later process of that
    // number.
    peer.pidfd = open_pidfd(peer.pid);
    if (peer.pidfd < 0) return std::string("pidfd_open: ") + std::strerror(errno);
    std::string problem = peer.segment.open(peer.pid, fd, world_, mark);
    if (problem.empty()) problem = peer.window.open(peer.pid, window_fd);
    if (!problem.empty()) return "rank " + std::to_string(r) + ": " + problem;
  }
  return "";
}

std::string ShmAllToAll::what() const {
  return "rank " + std::to_string(rank_) + " of " + std::to_string(world_) + ", exchange " +
         std::to_string(operation_) + ": ";
}

std::string ShmAllToAll::start(const char* input, char* output, const std::vector<Part>& send,
                               const std::vector<Part>& recv) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (getpid() != owner_pid_) return what() + "the communicator belongs to the process that made it, not to its fork";
  if (!error_.empty()) return error_;
  const Header& own = peers_[static_cast<size_t>(rank_)].segment.header();
  if (own.state.load() == static_cast<uint32_t>(State::aborted)) return error_ = what() + "aborted here: " + own.reason;
  if (running_) return what() + "the exchange before it has not ended";
  for (const Peer& peer : peers_)
    if (peer.segment.fd() < 0) return what() + "not connected to all ranks";
  ++operation_;
  for (int r = 0; r < world_; ++r) {
    Peer& peer = peers_[static_cast<size_t>(r)];
    peer.input = input + send[static_cast<size_t>(r)].offset;
    peer.output = output + recv[static_cast<size_t>(r)].offset;
    peer.send_bytes = static_cast<uint64_t>(send[static_cast<size_t>(r)].bytes);
    peer.recv_bytes = static_cast<uint64_t>(recv[static_cast<size_t>(r)].bytes);
    peer.sent = peer.received = 0;
    peer.pulled = nullptr;
  }
  Peer& self = peers_[static_cast<size_t>(rank_)];
  if (self.send_bytes != self.recv_bytes) {
    return what() + "sends itself " + std::to_string(self.send_bytes) + " bytes and expects " +
           std::to_string(self.recv_bytes);
  }
  staged_ = self.window.place_of(input, 1, &staged_place_, &staged_capacity_);
  staged_input_ = input;
  running_ = true;
  last_progress_ = last_look_ = Clock::now();
  return "";
}

void ShmAllToAll::ring_doorbell(int peer) {
  Header& header = peers_[static_cast<size_t>(peer)].segment.header();
  header.doorbell.fetch_add(1);
  if (header.sleeping.load() != 0) futex_wake(header.doorbell);
}

bool ShmAllToAll::send_piece(int to) {
  Peer& peer = peers_[static_cast<size_t>(to)];
  if (peer.sent == peer.send_bytes) return false;
  if (staged_) return publish(to);
  Segment& own = peers_[static_cast<size_t>(rank_)].segment;
  Ring& ring = own.ring(to);
  const uint64_t piece = ring.written.load(std::memory_order_relaxed);
  if (piece - ring.read.load(std::memory_order_acquire) >= kSlots) return false;
  Slot& slot = own.slot(to, piece);
  const uint64_t bytes = std::min<uint64_t>(kPieceBytes, peer.send_bytes - peer.sent);
  slot.operation = operation_;
  slot.message_bytes = peer.send_bytes;
  slot.piece_bytes = bytes;
  std::memcpy(slot.data, peer.input + peer.sent, bytes);
  peer.sent += bytes;
  ring.written.store(piece + 1, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  ring_doorbell(to);
  return true;
}

void ShmAllToAll::copy(const char* from, char* to, uint64_t bytes, bool streamed) const {
  if (streamed) {
    cpu::kernels().copy_streamed(from, to, static_cast<int64_t>(bytes));
  } else {
    std::memcpy(to, from, bytes);
  }
}

bool ShmAllToAll::disagrees(int from, uint64_t message_bytes, uint64_t operation) {
  const Peer& peer = peers_[static_cast<size_t>(from)];
  if (operation == operation_ && message_bytes == peer.recv_bytes) return false;
  fail("rank " + std::to_string(from) + " sent " + std::to_string(message_bytes) + " bytes in its exchange " +
       std::to_string(operation) + " where " + std::to_string(peer.recv_bytes) +
       " were expected: the ranks disagree about the splits");
  return true;
}

// The way that the next message of a peer takes; `other` where only one of another exchange is there.
ShmAllToAll::Way ShmAllToAll::next_message(int from) {
  const Peer& peer = peers_[static_cast<size_t>(from)];
  const Pull& pull = peer.segment.pull(rank_);
  const Ring& ring = peer.segment.ring(rank_);
  const uint64_t piece = ring.read.load(std::memory_order_relaxed);
  // A later message that is seen makes all earlier ones visible, but perhaps after they were looked for: look again.
  bool other = false;
  for (int look = 0; look < 2; ++look) {
    const bool rings = ring.written.load(std::memory_order_acquire) != piece;
    if (rings && peer.segment.slot(rank_, piece).operation == operation_) return Way::ring;
    const bool pulls = pull.pending();
    if (pulls && pull.operation == operation_) return Way::pull;
    if (look == 1 && other) return Way::other;
    other = rings || pulls;
  }
  return Way::none;
}

bool ShmAllToAll::receive_piece(int from, bool streamed) {
  Peer& peer = peers_[static_cast<size_t>(from)];
  if (peer.received == peer.recv_bytes) return false;
  Ring& ring = peer.segment.ring(rank_);
  const uint64_t piece = ring.read.load(std::memory_order_relaxed);
  const Slot& slot = peer.segment.slot(rank_, piece);
  switch (next_message(from)) {
    case Way::none:
      return false;
    case Way::pull:
      return pull_piece(from, streamed);
    case Way::other:
      if (peer.segment.pull(rank_).pending()) return pull_piece(from, streamed);
      break;
    case Way::ring:
      break;
  }
  if (disagrees(from, slot.message_bytes, slot.operation)) return false;
  if (slot.piece_bytes > peer.recv_bytes - peer.received)
    return fail("rank " + std::to_string(from) + " sent more than it announced");
  copy(slot.data, peer.output + peer.received, slot.piece_bytes, streamed);
  peer.received += slot.piece_bytes;
  ring.read.store(piece + 1, std::memory_order_release);
  // The sender cares only where its ring was full. The fences here and in send_piece order "I read" before "is it
  // full?" and "I wrote" before "was it read?": one of the two sees the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (ring.written.load(std::memory_order_acquire) - piece >= kSlots) ring_doorbell(from);
  return true;
}

bool ShmAllToAll::copy_own_piece(bool streamed) {
  Peer& self = peers_[static_cast<size_t>(rank_)];
  if (self.finished()) return false;
  const uint64_t bytes = std::min<uint64_t>(kPieceBytes, self.send_bytes - self.sent);
  copy(self.input + self.sent, self.output + self.sent, bytes, streamed);
  self.sent += bytes;
  self.received = self.sent;
  return true;
}

bool ShmAllToAll::fail(const std::string& reason) {
  if (error_.empty()) error_ = what() + reason;
  running_ = false;
  abort(error_);
  return false;
}

void ShmAllToAll::abort(const std::string& reason) {
  if (getpid() != owner_pid_) return;  // a fork's copy; the segment is still its parent's
  std::lock_guard<std::mutex> lock(life_);
  Segment& own = peers_[static_cast<size_t>(rank_)].segment;
  if (own.fd() < 0) return;
  Header& header = own.header();
  if (header.state.load() != static_cast<uint32_t>(State::open)) return;
  std::snprintf(header.reason, sizeof header.reason, "%s", reason.c_str());
  header.state.store(static_cast<uint32_t>(State::aborted));
  tell_process(reason);
  for (int r = 0; r < world_; ++r)
    if (peers_[static_cast<size_t>(r)].segment.fd() >= 0) ring_doorbell(r);
}

void ShmAllToAll::wait(uint32_t seen, Clock::time_point until) {
  Header& header = peers_[static_cast<size_t>(rank_)].segment.header();
  for (int spin = 0; spin < spins_; ++spin) {
    if (header.doorbell.load(std::memory_order_acquire) != seen) return;
    pause_cpu();
  }
  const double left = std::chrono::duration<double>(until - Clock::now()).count();
  if (left <= 0) return;
  // A ringer adds to the doorbell and then looks at `sleeping`; here the order is reversed, so no ring is missed.
  header.sleeping.store(1);
  futex_wait(header.doorbell, seen, std::min(left, kSliceSeconds));
  header.sleeping.store(0);
}

bool ShmAllToAll::peers_are_well(double timeout_s) {
  const Header& own = peers_[static_cast<size_t>(rank_)].segment.header();
  if (own.state.load() == static_cast<uint32_t>(State::aborted))
    return fail(std::string("aborted here: ") + own.reason);
  if (const std::string why = lost_elsewhere(); !why.empty()) return fail(why);
  const auto now = Clock::now();
  const bool thorough = std::chrono::duration<double>(now - last_look_).count() >= kSliceSeconds;  // costs system calls
  if (thorough) last_look_ = now;
  const double silent_s = std::chrono::duration<double>(now - last_progress_).count();
  for (int r = 0; r < world_; ++r) {
    Peer& peer = peers_[static_cast<size_t>(r)];
    if (r == rank_) continue;
    const Header& header = peer.segment.header();
    const auto state = static_cast<State>(header.state.load());
    const std::string name = "rank " + std::to_string(r) + " (process " + std::to_string(peer.pid) + ")";
    if (state == State::aborted) return fail(name + " gave up: " + header.reason);
    const bool has_to_read = peers_[static_cast<size_t>(rank_)].segment.pull(r).pending();
    if (!thorough || (peer.finished() && !has_to_read)) continue;
    // What a peer wrote before it left still counts: its ring is looked at after its end was seen.
    const bool gone = state == State::closed || has_ended(peer.pidfd);
    const bool has_data = peer.segment.ring(rank_).written.load(std::memory_order_acquire) !=
                              peer.segment.ring(rank_).read.load(std::memory_order_relaxed) ||
                          peer.segment.pull(rank_).pending();
    const std::string where = ": " + std::to_string(peer.received) + " of " + std::to_string(peer.recv_bytes) +
                              " bytes received, " + std::to_string(peer.sent) + " of " +
                              std::to_string(peer.send_bytes) + " sent";
    if (gone && (!has_data || has_to_read))
      return fail(name + (state == State::closed ? " closed the communicator" : " has ended") + where);
    if (silent_s > timeout_s) {
      return fail("nothing came from " + name + " for " + std::to_string(static_cast<int64_t>(timeout_s)) + " s" +
                  where);
    }
  }
  return true;
}

Progress ShmAllToAll::run(double seconds, double timeout_s) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_.empty()) return Progress::failed;
  if (!running_) return Progress::done;
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  Header& own = peers_[static_cast<size_t>(rank_)].segment.header();
  uint64_t total = 0;
  for (const Peer& peer : peers_) total += peer.recv_bytes;
  const bool streamed = total * static_cast<uint64_t>(world_) >= kStreamBytes;
  for (;;) {
    const uint32_t seen = own.doorbell.load(std::memory_order_acquire);
    bool moved = false, finished = true;
    for (int step = 1; step < world_; ++step) {
      moved |= send_piece((rank_ + step) % world_);
      moved |= receive_piece((rank_ - step + world_) % world_, streamed);
      if (!error_.empty()) return Progress::failed;
    }
    moved |= copy_own_piece(streamed);
    for (const Peer& peer : peers_) finished &= peer.finished();
    if (finished) {
      running_ = false;
      return Progress::done;
    }
    if (moved) {
      last_progress_ = Clock::now();
      continue;
    }
    if (!peers_are_well(timeout_s)) return Progress::failed;
    if (Clock::now() >= until) return Progress::pending;
    wait(seen, until);
  }
}

void ShmAllToAll::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::lock_guard<std::mutex> life(life_);
  Segment& own = peers_[static_cast<size_t>(rank_)].segment;
  if (own.fd() < 0) return;
  const bool is_owner = getpid() == owner_pid_;  // a fork only drops its mappings
  if (is_owner && own.header().state.load() == static_cast<uint32_t>(State::open)) {
    own.header().state.store(static_cast<uint32_t>(State::closed));
  }
  for (int r = 0; r < world_; ++r) {
    Peer& peer = peers_[static_cast<size_t>(r)];
    if (is_owner && r != rank_ && peer.segment.fd() >= 0) ring_doorbell(r);
    if (peer.pidfd >= 0) ::close(peer.pidfd);
    peer.pidfd = -1;
  }
  for (Peer& peer : peers_) {
    peer.segment.release();
    peer.window.release();
  }
  if (error_.empty()) error_ = what() + "the communicator is closed";
  running_ = false;
}

}  // namespace comm
}  // namespace samoe
