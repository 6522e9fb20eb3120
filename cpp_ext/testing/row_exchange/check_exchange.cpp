// A program without torch that runs the shared-memory exchange, for the sanitizers (tools/sanitize.sh).
//
//     check_exchange processes   ranks that are processes, as in training; one of them dies in the last exchanges
//     check_exchange threads     ranks that are threads, so that ThreadSanitizer sees both ends of a ring
//
// Rings, windows, empty parts, a rank that gives up, and ranks that disagree about sizes. Every byte says which rank
// sent it to which, and in which exchange. Ends with status 1 at the first difference.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../comm/shm_all_to_all.h"

namespace samoe {
namespace comm {

// Ranks that are threads of one process, each with its own object, see each other's memory at one address, as
// ThreadSanitizer has to; all[r] is rank r.
struct ThreadRanks {
  static void connect(const std::vector<ShmAllToAll*>& all) {
    for (ShmAllToAll* own : all) {
      for (int r = 0; r < own->world_; ++r) {
        if (r == own->rank_) continue;
        const ShmAllToAll::Peer& theirs = all[static_cast<size_t>(r)]->peers_[static_cast<size_t>(r)];
        ShmAllToAll::Peer& peer = own->peers_[static_cast<size_t>(r)];
        peer.pid = own->owner_pid_;
        peer.segment.share(theirs.segment);
        peer.window.share(theirs.window);
      }
    }
  }
};

}  // namespace comm
}  // namespace samoe

namespace {

using samoe::comm::Mapping;
using samoe::comm::Part;
using samoe::comm::Progress;
using samoe::comm::ShmAllToAll;

constexpr double kTimeout = 60;
constexpr int kExchanges = 40;

[[noreturn]] void differs(int rank, int exchange, const std::string& what) {
  std::fprintf(stderr, "difference: rank %d, exchange %d: %s\n", rank, exchange, what.c_str());
  std::_Exit(1);
}

char mark_of(int from, int to, int exchange) { return static_cast<char>(64 * exchange + 8 * from + to + 1); }

// What an exchange moves: sizes[from * world + to] bytes, the same numbers on all ranks. Some are large enough for
// several turns of a ring, and a quarter is empty.
std::vector<int64_t> sizes_of(int world, int exchange) {
  std::mt19937 shared(static_cast<unsigned>(exchange + 1));
  std::vector<int64_t> sizes(static_cast<size_t>(world * world));
  for (int64_t& size : sizes)
    size = shared() % 4 == 0 ? 0 : static_cast<int64_t>(shared() % (exchange % 8 == 0 ? 3000000 : 5000));
  return sizes;
}

struct Exchange {
  Exchange(int rank, int world, int number) : rank(rank), world(world), number(number) {
    const std::vector<int64_t> sizes = sizes_of(world, number);
    int64_t to = 0, from = 0;
    for (int r = 0; r < world; ++r) {
      send.push_back({to, sizes[static_cast<size_t>(rank * world + r)]});
      recv.push_back({from, sizes[static_cast<size_t>(r * world + rank)]});
      to += send.back().bytes;
      from += recv.back().bytes;
    }
    send_bytes = to;
    output.reset(new char[static_cast<size_t>(from)]);  // of its exact size, for AddressSanitizer
  }

  void fill(char* input) const {
    for (int r = 0; r < world; ++r)
      std::memset(input + send[static_cast<size_t>(r)].offset, mark_of(rank, r, number),
                  static_cast<size_t>(send[static_cast<size_t>(r)].bytes));
  }

  void check() const {
    for (int r = 0; r < world; ++r) {
      const Part& part = recv[static_cast<size_t>(r)];
      for (int64_t i = part.offset; i < part.offset + part.bytes; ++i)
        if (output[static_cast<size_t>(i)] != mark_of(r, rank, number))
          differs(rank, number, "a byte from rank " + std::to_string(r));
    }
  }

  int rank, world, number;
  std::vector<Part> send, recv;
  int64_t send_bytes = 0;
  std::unique_ptr<char[]> output;
};

// Runs what was started to its end; returns the error, or an empty string.
std::string finish(ShmAllToAll& communicator) {
  Progress progress = Progress::pending;
  while (progress == Progress::pending) progress = communicator.run(0.2, kTimeout);
  return progress == Progress::done ? "" : communicator.error();
}

std::string exchange_once(ShmAllToAll& communicator, int rank, int world, int number, bool staged) {
  const Exchange exchange(rank, world, number);
  std::unique_ptr<char[]> own(new char[static_cast<size_t>(exchange.send_bytes)]);
  char* input = own.get();
  std::shared_ptr<Mapping> window;
  if (staged) {
    std::string why;
    Progress progress = Progress::pending;
    while (progress == Progress::pending)
      progress = communicator.stage(exchange.send_bytes, 0.2, kTimeout, &window, &why);
    if (progress == Progress::failed) return "stage: " + why + communicator.error();
    input = window->base;
  }
  exchange.fill(input);
  std::string problem = communicator.start(input, exchange.output.get(), exchange.send, exchange.recv);
  if (problem.empty()) problem = finish(communicator);
  if (problem.empty()) exchange.check();
  return problem;
}

void exchange_all(ShmAllToAll& communicator, int rank, int world) {
  std::mt19937 own(static_cast<unsigned>(rank + 1));  // ranks choose their way each for itself
  for (int number = 0; number < kExchanges; ++number) {
    const std::string problem = exchange_once(communicator, rank, world, number, own() % 2 == 0);
    if (!problem.empty()) differs(rank, number, problem);
  }
}

void expect_error(int rank, const std::string& error, const std::string& part) {
  if (error.find(part) == std::string::npos) differs(rank, kExchanges, "'" + part + "' is not in '" + error + "'");
}

// Runs `body` on ranks that are threads of one group.
void with_threads(int world, const std::function<void(ShmAllToAll&, int)>& body) {
  std::vector<std::unique_ptr<ShmAllToAll>> own;
  std::vector<ShmAllToAll*> all;
  for (int r = 0; r < world; ++r) {
    own.push_back(std::make_unique<ShmAllToAll>(r, world, 50));
    all.push_back(own.back().get());
    const std::string problem = all.back()->create();
    if (!problem.empty()) differs(r, 0, problem);
  }
  samoe::comm::ThreadRanks::connect(all);
  std::vector<std::thread> threads;
  for (int r = 0; r < world; ++r) threads.emplace_back([&, r] { body(*all[static_cast<size_t>(r)], r); });
  for (std::thread& thread : threads) thread.join();
  for (ShmAllToAll* communicator : all) communicator->close();
}

// Rank 0 does not come to the exchange, and another of its threads gives up; all others wait for it and must hear why.
void check_abort() {
  with_threads(4, [](ShmAllToAll& communicator, int rank) {
    if (rank == 0) {
      std::thread([&communicator] { communicator.abort("a test gives up"); }).join();
      return;
    }
    expect_error(rank, exchange_once(communicator, rank, 4, 8, false), "a test gives up");
    // After an error nothing is begun.
    expect_error(rank, exchange_once(communicator, rank, 4, 9, false), "a test gives up");
  });
}

void check_disagreement() {
  with_threads(2, [](ShmAllToAll& communicator, int rank) {
    const std::vector<char> input(200000, 1);
    std::vector<char> output(200000);
    const int64_t wanted = rank == 0 ? 100001 : 100000;
    const std::vector<Part> send = {{0, rank == 0 ? 0 : 100000}, {100000, rank == 0 ? 100000 : 0}};
    const std::vector<Part> recv = {{0, rank == 0 ? 0 : wanted}, {0, rank == 0 ? wanted : 0}};
    std::string problem = communicator.start(input.data(), output.data(), send, recv);
    if (problem.empty()) problem = finish(communicator);
    if (rank == 0) expect_error(rank, problem, "disagree about the splits");
  });
}

int rank_of_processes(int rank, int world, int to_parent, int from_parent) {
  ShmAllToAll communicator(rank, world, 50);
  std::string problem = communicator.create();
  if (!problem.empty()) differs(rank, 0, problem);
  char line[128] = {};
  std::snprintf(line, sizeof line, "%s", communicator.address().c_str());
  if (write(to_parent, line, sizeof line) != sizeof line) return 3;
  std::vector<std::string> addresses;
  for (int r = 0; r < world; ++r) {
    if (read(from_parent, line, sizeof line) != sizeof line) return 4;
    addresses.emplace_back(line);
  }
  problem = communicator.connect(addresses);
  if (!problem.empty()) differs(rank, 0, problem);
  exchange_all(communicator, rank, world);
  if (world == 1) return 0;
  if (rank == world - 1) std::_Exit(0);  // without a farewell
  for (int number = 0; problem.empty(); ++number) problem = exchange_once(communicator, rank, world, number, false);
  // A rank hears of the death itself, or from one that did.
  expect_error(rank, problem, "has ended");
  return 0;
}

void check_processes(int world) {
  const size_t n = static_cast<size_t>(world);
  std::vector<int> up(2 * n), down(2 * n);
  for (size_t r = 0; r < n; ++r)
    if (pipe(&up[2 * r]) != 0 || pipe(&down[2 * r]) != 0) differs(-1, 0, "pipe");
  std::vector<pid_t> children;
  for (size_t r = 0; r < n; ++r) {
    const pid_t child = fork();
    if (child == 0) std::exit(rank_of_processes(static_cast<int>(r), world, up[2 * r + 1], down[2 * r]));
    children.push_back(child);
  }
  std::vector<char> lines(128 * n);
  for (size_t r = 0; r < n; ++r)
    if (read(up[2 * r], &lines[128 * r], 128) != 128) differs(static_cast<int>(r), 0, "no address came");
  for (size_t r = 0; r < n; ++r)
    for (size_t i = 0; i < n; ++i)
      if (write(down[2 * r + 1], &lines[128 * i], 128) != 128) differs(static_cast<int>(r), 0, "write");
  bool good = true;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    good &= status == 0;
  }
  if (!good) differs(-1, 0, "a rank of " + std::to_string(world) + " failed");
  for (const int fd : up) close(fd);
  for (const int fd : down) close(fd);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kind = argc == 2 ? argv[1] : "";
  if (kind != "processes" && kind != "threads") {
    std::fprintf(stderr, "usage: %s processes|threads\n", argv[0]);
    return 2;
  }
  for (const int world : {1, 2, 4}) {
    if (kind == "processes") {
      check_processes(world);
    } else {
      with_threads(world, [world](ShmAllToAll& communicator, int rank) { exchange_all(communicator, rank, world); });
    }
  }
  if (kind == "threads") {
    check_abort();
    check_disagreement();
  }
  std::printf("%d exchanges each of 1, 2 and 4 ranks that are %s agree\n", kExchanges, kind.c_str());
  return 0;
}
