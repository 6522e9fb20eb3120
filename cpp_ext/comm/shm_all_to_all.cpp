#include "shm_all_to_all.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>

#include "../kernels/kernels.h"

namespace samoe {
namespace comm {
namespace {

constexpr double kSliceSeconds = 0.05;      // of a sleep; how late a dead peer is noticed
constexpr uint64_t kStreamBytes = 1 << 20;  // a larger exchange is written past the cache
constexpr int kPidfdOpen = 434;             // SYS_pidfd_open, missing from older headers

void futex_wait(std::atomic<uint32_t>& word, uint32_t value, double seconds) {
  timespec time;
  time.tv_sec = static_cast<time_t>(seconds);
  time.tv_nsec = static_cast<long>((seconds - static_cast<double>(time.tv_sec)) * 1e9);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &time, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A pidfd becomes readable when its process has ended. kill(pid, 0) would take a zombie for alive.
bool has_ended(int pidfd) {
  if (pidfd < 0) return false;
  pollfd request = {pidfd, POLLIN, 0};
  return poll(&request, 1, 0) > 0;
}

}  // namespace

ShmAllToAll::ShmAllToAll(int rank, int world, int spins)
    : rank_(rank), world_(world), spins_(spins), owner_pid_(getpid()), peers_(static_cast<size_t>(world)) {
  std::random_device random;
  mark_ = (static_cast<uint64_t>(random()) << 32) | random();
}

ShmAllToAll::~ShmAllToAll() { close(); }

std::string ShmAllToAll::create() { return peers_[static_cast<size_t>(rank_)].segment.create(world_, mark_); }

std::string ShmAllToAll::address() const {
  return std::to_string(owner_pid_) + " " + std::to_string(peers_[static_cast<size_t>(rank_)].segment.fd()) + " " +
         std::to_string(mark_);
}

std::string ShmAllToAll::connect(const std::vector<std::string>& addresses) {
  for (int r = 0; r < world_; ++r) {
    if (r == rank_) continue;
    Peer& peer = peers_[static_cast<size_t>(r)];
    int fd = -1;
    unsigned long long mark = 0;
    if (std::sscanf(addresses[static_cast<size_t>(r)].c_str(), "%d %d %llu", &peer.pid, &fd, &mark) != 3) {
      return "rank " + std::to_string(r) + " has no segment";
    }
    // The pidfd comes first: once the mark is verified it is known to mean the peer, not a later process of that
    // number.
    peer.pidfd = static_cast<int>(syscall(kPidfdOpen, peer.pid, 0));
    if (peer.pidfd < 0) return std::string("pidfd_open: ") + std::strerror(errno);
    const std::string problem = peer.segment.open(peer.pid, fd, world_, mark);
    if (!problem.empty()) return "rank " + std::to_string(r) + ": " + problem;
  }
  return "";
}

std::string ShmAllToAll::what() const {
  return "rank " + std::to_string(rank_) + " of " + std::to_string(world_) + ", exchange " +
         std::to_string(operation_) + ": ";
}

std::string ShmAllToAll::start(const char* input, char* output, const std::vector<int64_t>& send_bytes,
                               const std::vector<int64_t>& recv_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (getpid() != owner_pid_) return what() + "the communicator belongs to the process that made it, not to its fork";
  if (!error_.empty()) return error_;
  const Header& own = peers_[static_cast<size_t>(rank_)].segment.header();
  if (own.state.load() == static_cast<uint32_t>(State::aborted)) return error_ = what() + "aborted here: " + own.reason;
  if (running_) return what() + "the exchange before it has not ended";
  ++operation_;
  for (int r = 0; r < world_; ++r) {
    Peer& peer = peers_[static_cast<size_t>(r)];
    peer.input = input;
    peer.output = output;
    peer.send_bytes = static_cast<uint64_t>(send_bytes[static_cast<size_t>(r)]);
    peer.recv_bytes = static_cast<uint64_t>(recv_bytes[static_cast<size_t>(r)]);
    peer.sent = peer.received = 0;
    input += peer.send_bytes;
    output += peer.recv_bytes;
  }
  Peer& self = peers_[static_cast<size_t>(rank_)];
  if (self.send_bytes != self.recv_bytes) {
    return what() + "sends itself " + std::to_string(self.send_bytes) + " bytes and expects " +
           std::to_string(self.recv_bytes);
  }
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

bool ShmAllToAll::receive_piece(int from, bool streamed) {
  Peer& peer = peers_[static_cast<size_t>(from)];
  if (peer.received == peer.recv_bytes) return false;
  Ring& ring = peer.segment.ring(rank_);
  const uint64_t piece = ring.read.load(std::memory_order_relaxed);
  if (ring.written.load(std::memory_order_acquire) == piece) return false;
  const Slot& slot = peer.segment.slot(rank_, piece);
  if (slot.operation != operation_ || slot.message_bytes != peer.recv_bytes ||
      slot.piece_bytes > peer.recv_bytes - peer.received) {
    return fail("rank " + std::to_string(from) + " sent " + std::to_string(slot.message_bytes) +
                " bytes in its exchange " + std::to_string(slot.operation) + " where " +
                std::to_string(peer.recv_bytes) + " were expected: the ranks disagree about the splits");
  }
  if (streamed) {
    cpu::kernels().copy_streamed(slot.data, peer.output + peer.received, static_cast<int64_t>(slot.piece_bytes));
  } else {
    std::memcpy(peer.output + peer.received, slot.data, slot.piece_bytes);
  }
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
  if (streamed) {
    cpu::kernels().copy_streamed(self.input + self.sent, self.output + self.sent, static_cast<int64_t>(bytes));
  } else {
    std::memcpy(self.output + self.sent, self.input + self.sent, bytes);
  }
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
  Segment& own = peers_[static_cast<size_t>(rank_)].segment;
  if (own.fd() < 0) return;
  Header& header = own.header();
  if (header.state.load() != static_cast<uint32_t>(State::open)) return;
  std::snprintf(header.reason, sizeof header.reason, "%s", reason.c_str());
  header.state.store(static_cast<uint32_t>(State::aborted));
  for (int r = 0; r < world_; ++r) ring_doorbell(r);
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
    if (!thorough || peer.finished()) continue;
    // What a peer wrote before it left still counts: its ring is looked at after its end was seen.
    const bool gone = state == State::closed || has_ended(peer.pidfd);
    const bool has_data = peer.segment.ring(rank_).written.load(std::memory_order_acquire) !=
                          peer.segment.ring(rank_).read.load(std::memory_order_relaxed);
    const std::string where = ": " + std::to_string(peer.received) + " of " + std::to_string(peer.recv_bytes) +
                              " bytes received, " + std::to_string(peer.sent) + " of " +
                              std::to_string(peer.send_bytes) + " sent";
    if (gone && !has_data)
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
  const bool streamed = total >= kStreamBytes;
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
  for (Peer& peer : peers_) peer.segment.release();
  if (error_.empty()) error_ = what() + "the communicator is closed";
  running_ = false;
}

}  // namespace comm
}  // namespace samoe
