// All-to-all between the processes of one host through shared memory.
//
// Each pair of ranks has a ring of four pieces in the sender's segment. A rank fills the rings of its peers and empties
// theirs in turn; it waits only when neither is possible, and only for its own pairs. Whoever writes or reads a piece
// rings the other's doorbell. A wait spins for a moment, then sleeps in the kernel in short slices, in which it looks
// whether a peer gave up, died (pidfd) or stays silent for too long.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "shm_segment.h"

namespace samoe {
namespace comm {

enum class Progress { done, pending, failed };

class ShmAllToAll {
 public:
  // spins: turns of a wait before it sleeps; many with a core per rank, few where ranks share cores.
  ShmAllToAll(int rank, int world, int spins);
  ~ShmAllToAll();
  ShmAllToAll(const ShmAllToAll&) = delete;
  ShmAllToAll& operator=(const ShmAllToAll&) = delete;

  // Makes this rank's segment. Returns an empty string, or why it failed.
  std::string create();
  // Where peers find the segment: "pid fd mark".
  std::string address() const;
  // Opens the peers' segments; addresses are in rank order. Returns an empty string, or why it failed.
  std::string connect(const std::vector<std::string>& addresses);

  // Begins an exchange: send_bytes[d] bytes of input go to rank d, recv_bytes[s] bytes of output come from rank s, each
  // side in rank order. The memory must stay until run() returns something other than pending. Returns an empty string,
  // or why it cannot begin.
  std::string start(const char* input, char* output, const std::vector<int64_t>& send_bytes,
                    const std::vector<int64_t>& recv_bytes);
  // Works on the exchange for up to `seconds`. After failed, error() says why and the communicator stays unusable.
  Progress run(double seconds, double timeout_s);
  // Gives up on all ranks; the first reason counts. May be called from any thread.
  void abort(const std::string& reason);
  void close();

  const std::string& error() const { return error_; }
  int world() const { return world_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Peer {
    Segment segment;
    int pidfd = -1;
    int pid = 0;
    const char* input = nullptr;
    char* output = nullptr;
    uint64_t send_bytes = 0, sent = 0, recv_bytes = 0, received = 0;
    bool finished() const { return sent == send_bytes && received == recv_bytes; }
  };

  bool send_piece(int to);
  bool receive_piece(int from, bool streamed);
  bool copy_own_piece(bool streamed);  // what a rank sends itself, a piece a turn: its peers must not wait for it
  void ring_doorbell(int peer);
  void wait(uint32_t seen, Clock::time_point until);
  bool peers_are_well(double timeout_s);
  bool fail(const std::string& reason);
  std::string what() const;

  int rank_, world_, spins_, owner_pid_;
  uint64_t mark_ = 0, operation_ = 0;
  bool running_ = false;
  std::vector<Peer> peers_;  // peers_[rank_].segment is this rank's own
  std::string error_;
  Clock::time_point last_progress_, last_look_;
  std::mutex mutex_;
};

}  // namespace comm
}  // namespace samoe
