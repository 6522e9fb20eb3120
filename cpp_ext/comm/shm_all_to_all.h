// All-to-all between the processes of one host through shared memory.
//
// Each pair of ranks has a ring of four pieces in the sender's segment. A rank fills the rings of its peers and empties
// theirs in turn; it waits only when neither is possible, and only for its own pairs. A message that lies in the
// sender's window (stage) needs no ring: the receiver copies it from there. Which of the two a message takes is its
// sender's choice; the receiver looks at both. Whoever writes or reads a piece rings the other's doorbell. A wait spins
// for a moment, then sleeps in the kernel in short slices, in which it looks whether a peer gave up, died (pidfd) or
// stays silent for too long.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "all_to_all.h"
#include "shm_segment.h"
#include "shm_window.h"

namespace samoe {
namespace comm {

class ShmAllToAll : public AllToAll {
 public:
  // spins: turns of a wait before it sleeps; many with a core per rank, few where ranks share cores.
  ShmAllToAll(int rank, int world, int spins, double timeout_s = 600.0);
  ~ShmAllToAll() override;

  // Makes this rank's segment. Returns an empty string, or why it failed.
  std::string create();
  // Where peers find segment and window: "pid fd window_fd mark".
  std::string address() const override;
  // Opens the peers' segments at once.
  std::string connect(const std::vector<std::string>& addresses) override;

  // Memory in this rank's window for an input of that many bytes, of which peers make one copy in place of two. It is
  // valid until the next call. Waits until peers have read what lay there. failed: error() says why, or, where it
  // is empty, *why says why there is no such memory; other exchanges still work.
  Progress stage(int64_t bytes, double seconds, double timeout_s, std::shared_ptr<Mapping>* memory, std::string* why);

  // One exchange at a time.
  std::string start(const char* input, char* output, const std::vector<Part>& send,
                    const std::vector<Part>& recv) override;
  int64_t last_started() const override { return static_cast<int64_t>(operation_); }
  Progress finish(int64_t, double seconds) override { return run(seconds, timeout_s_); }
  // As finish, with a time-out of its own.
  Progress run(double seconds, double timeout_s);
  // Gives up on all ranks.
  void abort(const std::string& reason) override;
  void close() override;
  std::string last_error() override { return error_; }

  const std::string& error() const { return error_; }

 private:
  friend struct ThreadRanks;  // of a check program: ranks that are threads
  using Clock = std::chrono::steady_clock;
  struct Peer {
    Segment segment;
    Window window;
    const char* pulled = nullptr;  // the message in the peer's window, once it is mapped
    int pidfd = -1;
    int pid = 0;
    const char* input = nullptr;
    char* output = nullptr;
    uint64_t send_bytes = 0, sent = 0, recv_bytes = 0, received = 0;
    bool finished() const { return sent == send_bytes && received == recv_bytes; }
  };

  enum class Way { none, ring, pull, other };

  Way next_message(int from);
  bool send_piece(int to);
  bool publish(int to);
  bool receive_piece(int from, bool streamed);
  bool pull_piece(int from, bool streamed);
  bool disagrees(int from, uint64_t message_bytes, uint64_t operation);
  bool window_is_read(int buffer) const;
  void copy(const char* from, char* to, uint64_t bytes, bool streamed) const;
  bool copy_own_piece(bool streamed);  // what a rank sends itself, a piece a turn: its peers must not wait for it
  void ring_doorbell(int peer);
  void wait(uint32_t seen, Clock::time_point until);
  bool peers_are_well(double timeout_s);
  bool fail(const std::string& reason);
  std::string what() const;

  int spins_, owner_pid_;
  uint64_t mark_ = 0, operation_ = 0;
  bool running_ = false, staging_ = false;
  bool staged_ = false;  // the exchange's input lies in the window
  const char* staged_input_ = nullptr;
  uint64_t staged_place_ = 0, staged_capacity_ = 0;
  int buffer_ = 0;           // of the window, the last one used
  std::vector<Peer> peers_;  // peers_[rank_].segment is this rank's own
  std::string error_;
  Clock::time_point last_progress_, last_look_;
  std::mutex mutex_;
  std::mutex life_;  // an abort may come from any thread, also while the segments are released
};

}  // namespace comm
}  // namespace samoe
