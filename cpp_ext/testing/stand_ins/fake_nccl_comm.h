// A communicator of the stand-in for NCCL: its sockets, and the thread that stands for its stream.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fake_device.h"

namespace {

enum Result {
  kSuccess = 0,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7
};

// A group ends so much after its last byte has come; until then its receivers' memory holds poison, and after an abort
// for good: words of 0x7fff, which are NaN in every floating type and a large number in int64.
constexpr auto kLate = std::chrono::milliseconds(2);

constexpr uint64_t kFarewell = ~uint64_t{0};  // in place of a length, by a rank that has been finalized

// One direction of one pair in an exchange: 8 bytes of length, then the data.
struct Transfer {
  int peer = 0;
  char* data = nullptr;
  std::vector<char> arrived;  // where it is received: data's content in the end
  bool poisoned = false;
  uint64_t bytes = 0;
  uint64_t expected = 0;  // length, which kFarewell stands in for
  uint64_t length = 0;    // as it travels
  uint64_t moved = 0;     // of 8 + bytes
  bool done() const { return moved == 8 + bytes; }
};

struct Group {
  std::vector<Transfer> sends, receives;
  int64_t launch = 0;

  bool uses(const Transfer& other) const {
    for (const auto* list : {&sends, &receives})
      for (const Transfer& own : *list)
        if (own.data < other.data + other.bytes && other.data < own.data + own.bytes) return true;
    return false;
  }
};

void poison(Transfer& receive) {
  for (uint64_t i = 0; i < receive.bytes; ++i) receive.data[i] = static_cast<char>(i % 2 == 0 ? 0xff : 0x7f);
  receive.poisoned = true;
}

struct Comm {
  int rank = 0, world = 0;
  std::string name;
  int listener = -1;
  std::vector<int> sockets;
  std::atomic<int> state{kInProgress};
  std::atomic<bool> stop{false};
  std::atomic<bool> leaving{false}, finalized{false};
  std::atomic<int> looks{0};  // that will still see a group being enqueued; at the last one it is launched
  Group enqueued;
  std::thread worker;
  std::vector<Transfer> sends, receives;  // of the group that is being collected
  std::mutex mutex;
  std::deque<Group> groups;  // launched
  std::atomic<int64_t> finished{0};
  std::vector<void*> registered;
};

std::mutex count_mutex;  // of what follows
std::map<std::string, int64_t> counts;  // what tests ask for

void note(const std::string& what) {
  std::lock_guard<std::mutex> lock(count_mutex);
  ++counts[what];
}

std::string last_error;  // as in NCCL, of the process

int fail(Comm& comm, Result result, const std::string& text) {
  {
    std::lock_guard<std::mutex> lock(count_mutex);
    last_error = text;
  }
  comm.state = result;
  return result;
}

sockaddr_un address_of(const Comm& comm, int rank, socklen_t* length) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  // A leading zero byte: an abstract name, gone with its process.
  const int n =
      std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "fake-nccl-%s-%d", comm.name.c_str(), rank);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(n));
  return address;
}

bool ready(int fd, short events, const Comm& comm) {
  while (!comm.stop) {
    pollfd request = {fd, events, 0};
    if (poll(&request, 1, 20) > 0) return true;
  }
  return false;
}

// Connects every pair: the lower rank listens.
void connect_all(Comm* comm) {
  for (int peer = 0; peer < comm->rank; ++peer) {
    socklen_t length;
    const sockaddr_un address = address_of(*comm, peer, &length);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(fd, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      if (comm->stop) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    const int32_t me = comm->rank;
    if (write(fd, &me, sizeof me) != sizeof me) {
      fail(*comm, kSystemError, "write while connecting");
      return;
    }
    comm->sockets[static_cast<size_t>(peer)] = fd;
  }
  for (int peer = comm->rank + 1; peer < comm->world; ++peer) {
    if (!ready(comm->listener, POLLIN, *comm)) return;
    const int fd = accept4(comm->listener, nullptr, nullptr, SOCK_CLOEXEC);
    int32_t who = -1;
    if (!ready(fd, POLLIN, *comm) || read(fd, &who, sizeof who) != sizeof who) return;
    comm->sockets[static_cast<size_t>(who)] = fd;
  }
  comm->state = kSuccess;
}

// Moves what a socket takes or has; false when the peer is gone or sent another length than expected.
bool advance(Comm& comm, Transfer& transfer, bool sending) {
  const int fd = comm.sockets[static_cast<size_t>(transfer.peer)];
  const bool header = transfer.moved < 8;
  char* data = sending ? transfer.data : transfer.arrived.data();
  char* place = header ? reinterpret_cast<char*>(&transfer.length) + transfer.moved : data + (transfer.moved - 8);
  const uint64_t bytes = header ? 8 - transfer.moved : 8 + transfer.bytes - transfer.moved;
  const ssize_t n =
      sending ? send(fd, place, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) : recv(fd, place, bytes, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
  if (n <= 0) {
    fail(comm, kRemoteError, "peer " + std::to_string(transfer.peer) + " closed the connection");
    return false;
  }
  transfer.moved += static_cast<uint64_t>(n);
  if (!sending && transfer.moved == 8 && transfer.length == kFarewell && transfer.expected != kFarewell) {
    fail(comm, kRemoteError, "peer " + std::to_string(transfer.peer) + " has finalized its communicator");
    return false;
  }
  if (!sending && transfer.moved == 8 && transfer.length != transfer.expected) {
    fail(comm, kInvalidUsage,
         "message truncated: peer " + std::to_string(transfer.peer) + " sent " + std::to_string(transfer.length) +
             " bytes, expected " + std::to_string(transfer.bytes));
    return false;
  }
  return true;
}

// A rank's messages to itself, which are matched by their order as all others.
void copy_own(const Comm& comm, Group& group) {
  auto receive = group.receives.begin();
  for (Transfer& send : group.sends) {
    if (send.peer != comm.rank) continue;
    while (receive != group.receives.end() && receive->peer != comm.rank) ++receive;
    if (receive == group.receives.end()) return;
    if (send.bytes == receive->bytes && send.bytes > 0) std::memcpy(receive->arrived.data(), send.data, send.bytes);
    send.moved = 8 + send.bytes;
    receive->moved = 8 + receive->bytes;
    ++receive;
  }
}

// The kind of this rank's fault, if it is due in this group.
std::string fault_of(const Comm& comm) {
  const char* fault = std::getenv("FAKE_NCCL_FAULT");
  int rank = -1, exchange = -1;
  char text[16] = {};
  if (fault == nullptr || std::sscanf(fault, "%d:%d:%15s", &rank, &exchange, text) != 3) return "";
  return rank == comm.rank && exchange == comm.finished ? text : "";
}

// Returns whether all messages of the group arrived.
bool move_all(Comm* comm, Group& group) {
  while (!comm->stop) {
    bool finished = true;
    std::vector<pollfd> requests;
    for (auto* list : {&group.sends, &group.receives}) {
      const bool sending = list == &group.sends;
      std::vector<bool> busy(static_cast<size_t>(comm->world));  // messages of a pair go one after the other
      for (Transfer& transfer : *list) {
        if (transfer.done() || busy[static_cast<size_t>(transfer.peer)]) continue;
        if (!advance(*comm, transfer, sending)) return false;
        if (transfer.done()) continue;
        busy[static_cast<size_t>(transfer.peer)] = true;
        finished = false;
        requests.push_back(
            {comm->sockets[static_cast<size_t>(transfer.peer)], static_cast<short>(sending ? POLLOUT : POLLIN), 0});
      }
    }
    if (finished) return true;
    poll(requests.data(), requests.size(), 5);
  }
  return false;
}

// Returns whether the group was done.
bool run_group(Comm* comm, Group& group) {
  while (!has_its_turn(group.launch)) {
    if (comm->stop) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  const std::string fault = fault_of(*comm);
  if (fault == "exit") _exit(3);
  if (fault == "error") {
    fail(*comm, kSystemError, "injected fault");
    return false;
  }
  while (fault == "hang" && !comm->stop) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  for (Transfer& receive : group.receives)
    if (!receive.poisoned) poison(receive);
  copy_own(*comm, group);
  if (!move_all(comm, group)) return false;
  std::this_thread::sleep_for(kLate);
  if (comm->stop) return false;
  for (const Transfer& receive : group.receives)
    if (receive.bytes > 0) std::memcpy(receive.data, receive.arrived.data(), receive.bytes);
  return true;
}

// Takes a group as NCCL does, which launches it later. What an earlier group still uses is poisoned after that.
void enqueue(Comm* comm) {
  std::lock_guard<std::mutex> lock(comm->mutex);
  Group& group = comm->enqueued = {std::move(comm->sends), std::move(comm->receives)};
  comm->sends.clear();
  comm->receives.clear();
  for (Transfer& receive : group.receives) {
    receive.arrived.resize(receive.bytes);
    bool in_use = false;
    for (const Group& earlier : comm->groups) in_use |= earlier.uses(receive);
    if (!in_use) poison(receive);
  }
}

void launch_enqueued(Comm* comm) {
  std::lock_guard<std::mutex> lock(comm->mutex);
  comm->enqueued.launch = launch();
  comm->groups.push_back(std::move(comm->enqueued));
}

// Whether peers hear nothing of a communicator's end.
bool is_quiet() { return std::getenv("FAKE_NCCL_QUIET") != nullptr; }

// Tells all peers that nothing comes any more and waits for the same word from each.
void take_leave(Comm* comm) {
  while (fault_of(*comm) == "finalize" && !comm->stop) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  Group farewells;
  for (int peer = 0; peer < comm->world; ++peer) {
    Transfer transfer;
    transfer.peer = peer;
    transfer.expected = transfer.length = kFarewell;
    if (peer == comm->rank || is_quiet()) continue;
    farewells.sends.push_back(transfer);
    farewells.receives.push_back(transfer);
  }
  if (!move_all(comm, farewells)) return;
  comm->finalized = true;
  comm->state = kSuccess;
}

// What the communicator's thread does: it connects, then works on what is enqueued.
void work(Comm* comm) {
  connect_all(comm);
  while (!comm->stop) {
    Group* group = nullptr;
    {
      std::lock_guard<std::mutex> lock(comm->mutex);
      if (!comm->groups.empty()) group = &comm->groups.front();
    }
    if (group == nullptr && comm->leaving) return take_leave(comm);
    if (group == nullptr) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      continue;
    }
    if (!run_group(comm, *group)) return;
    std::lock_guard<std::mutex> lock(comm->mutex);
    leave_device(group->launch);
    comm->groups.pop_front();
    ++comm->finished;
  }
}

// Ends the communicator's thread and frees what it holds; peers hear of it by the sockets' end.
void release(Comm* comm) {
  comm->stop = true;
  if (comm->worker.joinable()) comm->worker.join();
  for (const Group& group : comm->groups) leave_device(group.launch);
  for (const int fd : comm->sockets)
    if (fd >= 0 && !is_quiet()) close(fd);
  close(comm->listener);
  if (!comm->registered.empty()) note("registered at the end");
  delete comm;
}

}  // namespace
