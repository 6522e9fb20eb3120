// A library with NCCL's interface over sockets and host memory, for tests of everything around NCCL on machines without
// a GPU: order, splits, deadlines, errors, aborts. It is non-blocking as NCCL is with blocking = 0:
// ncclCommGetAsyncError says "in progress" at the first looks after a group of calls; a thread per communicator, which
// stands for its stream, then does the groups one after the other.
//
// FAKE_NCCL_FAULT=RANK:EXCHANGE:KIND makes one rank misbehave in one group (0 is the first): error, hang or exit.
// With FAKE_NCCL_OLD defined it lacks what only newer releases have.
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
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

enum Result {
  kSuccess = 0,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7
};

struct UniqueId {
  char internal[128];
};

// One direction of one pair in an exchange: 8 bytes of length, then the data.
struct Transfer {
  int peer = 0;
  char* data = nullptr;
  uint64_t bytes = 0;
  uint64_t length = 0;  // as it travels
  uint64_t moved = 0;   // of 8 + bytes
  bool done() const { return moved == 8 + bytes; }
};

struct Group {
  std::vector<Transfer> sends, receives;
};

struct Comm {
  int rank = 0, world = 0;
  std::string name;
  int listener = -1;
  std::vector<int> sockets;
  std::atomic<int> state{kInProgress};
  std::atomic<bool> stop{false};
  std::atomic<int> looks{0};  // that will still see the last group being enqueued
  std::thread worker;
  std::vector<Transfer> sends, receives;  // of the group that is being collected
  std::mutex mutex;
  std::deque<Group> groups;  // enqueued
  std::atomic<int64_t> finished{0};
  std::vector<void*> registered;
};

std::mutex count_mutex;
std::map<std::string, int64_t> counts;  // what tests ask for

void note(const std::string& what) {
  std::lock_guard<std::mutex> lock(count_mutex);
  ++counts[what];
}

thread_local std::vector<Comm*> group_comms;
thread_local int group_depth = 0;
std::string last_error;  // as in NCCL, of the process

int fail(Comm& comm, Result result, const std::string& text) {
  last_error = text;
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
  char* place =
      header ? reinterpret_cast<char*>(&transfer.length) + transfer.moved : transfer.data + (transfer.moved - 8);
  const uint64_t bytes = header ? 8 - transfer.moved : 8 + transfer.bytes - transfer.moved;
  const ssize_t n =
      sending ? send(fd, place, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) : recv(fd, place, bytes, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
  if (n <= 0) {
    fail(comm, kRemoteError, "peer " + std::to_string(transfer.peer) + " closed the connection");
    return false;
  }
  transfer.moved += static_cast<uint64_t>(n);
  if (!sending && transfer.moved == 8 && transfer.length != transfer.bytes) {
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
    if (send.bytes == receive->bytes) std::memcpy(receive->data, send.data, send.bytes);
    send.moved = 8 + send.bytes;
    receive->moved = 8 + receive->bytes;
    ++receive;
  }
}

bool has_fault(const Comm& comm, std::string* kind) {
  const char* fault = std::getenv("FAKE_NCCL_FAULT");
  int rank = -1, exchange = -1;
  char text[16] = {};
  if (fault == nullptr || std::sscanf(fault, "%d:%d:%15s", &rank, &exchange, text) != 3) return false;
  *kind = text;
  return rank == comm.rank && exchange == comm.finished;
}

// Returns whether the group was done.
bool run_group(Comm* comm, Group& group) {
  std::string fault;
  if (has_fault(*comm, &fault)) {
    if (fault == "exit") _exit(3);
    if (fault == "error") {
      fail(*comm, kSystemError, "injected fault");
      return false;
    }
    while (!comm->stop) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return false;
  }
  copy_own(*comm, group);
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

// What the communicator's thread does: it connects, then works on what is enqueued.
void work(Comm* comm) {
  connect_all(comm);
  while (!comm->stop) {
    Group* group = nullptr;
    {
      std::lock_guard<std::mutex> lock(comm->mutex);
      if (!comm->groups.empty()) group = &comm->groups.front();
    }
    if (group == nullptr) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      continue;
    }
    if (!run_group(comm, *group)) return;
    std::lock_guard<std::mutex> lock(comm->mutex);
    comm->groups.pop_front();
    ++comm->finished;
  }
}

int add(Comm* comm, std::vector<Transfer> Comm::* list, const void* data, size_t count, int datatype, int peer) {
  if (group_depth == 0 || comm->state != kSuccess || comm->looks > 0) return kInvalidUsage;
  if (datatype != 1 || peer < 0 || peer >= comm->world) return kInvalidArgument;
  Transfer transfer;
  transfer.peer = peer;
  transfer.data = static_cast<char*>(const_cast<void*>(data));
  transfer.bytes = transfer.length = count;
  (comm->*list).push_back(transfer);
  if (list == &Comm::sends) note("sends to " + std::to_string(peer));
  for (const Comm* known : group_comms)
    if (known == comm) return kSuccess;
  group_comms.push_back(comm);
  return kSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What tells this library from a real one: its memory is the host's, and it says how many groups a communicator has done.
EXPORT int64_t megatron_samoe_fake_nccl_finished(Comm* comm) { return comm->finished; }

// "sends to N", "ncclAlltoAll", "registered": how often, on all communicators of this process.
EXPORT int64_t megatron_samoe_fake_nccl_count(const char* what) {
  std::lock_guard<std::mutex> lock(count_mutex);
  return counts[what];
}

EXPORT int ncclGetVersion(int* version) {
  *version = 21801;
  return kSuccess;
}

EXPORT const char* ncclGetErrorString(int result) {
  switch (result) {
    case kSystemError:
      return "unhandled system error";
    case kInvalidArgument:
      return "invalid argument";
    case kInvalidUsage:
      return "invalid usage";
    case kRemoteError:
      return "remote process exited or there was a network error";
    default:
      return "no error";
  }
}

EXPORT const char* ncclGetLastError(void*) { return last_error.c_str(); }

EXPORT int ncclGetUniqueId(UniqueId* id) {
  std::random_device random;
  std::memset(id, 0, sizeof *id);
  std::snprintf(id->internal, sizeof id->internal, "%08x%08x", random(), random());
  return kSuccess;
}

EXPORT int ncclCommInitRankConfig(Comm** out, int world, UniqueId id, int rank, void*) {
  auto* comm = new Comm();
  comm->rank = rank;
  comm->world = world;
  comm->name = id.internal;
  comm->sockets.assign(static_cast<size_t>(world), -1);
  comm->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  socklen_t length;
  const sockaddr_un address = address_of(*comm, rank, &length);
  if (bind(comm->listener, reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      listen(comm->listener, world) != 0) {
    delete comm;
    return kSystemError;
  }
  comm->worker = std::thread(work, comm);
  *out = comm;
  return kInProgress;
}

EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
  *state = comm->state;
  if (*state == kSuccess && comm->looks > 0) {
    --comm->looks;
    *state = kInProgress;
  }
  return kSuccess;
}

EXPORT int ncclCommAbort(Comm* comm) {
  comm->stop = true;
  if (comm->worker.joinable()) comm->worker.join();
  for (const int fd : comm->sockets)
    if (fd >= 0) close(fd);
  close(comm->listener);
  delete comm;
  return kSuccess;
}

EXPORT int ncclGroupStart() {
  ++group_depth;
  return kSuccess;
}

EXPORT int ncclGroupEnd() {
  if (group_depth == 0) return kInvalidUsage;
  if (--group_depth > 0) return kSuccess;
  int result = kSuccess;
  for (Comm* comm : group_comms) {
    comm->looks = 2;
    std::lock_guard<std::mutex> lock(comm->mutex);
    comm->groups.push_back({std::move(comm->sends), std::move(comm->receives)});
    comm->sends.clear();
    comm->receives.clear();
    result = kInProgress;
  }
  group_comms.clear();
  return result;
}

EXPORT int ncclSend(const void* data, size_t count, int datatype, int peer, Comm* comm, void*) {
  return add(comm, &Comm::sends, data, count, datatype, peer);
}

EXPORT int ncclRecv(void* data, size_t count, int datatype, int peer, Comm* comm, void*) {
  return add(comm, &Comm::receives, data, count, datatype, peer);
}

#ifndef FAKE_NCCL_OLD
EXPORT int ncclAlltoAll(const void* send, void* receive, size_t bytes, int datatype, Comm* comm, void*) {
  note("ncclAlltoAll");
  int result = kSuccess;
  for (int peer = 0; peer < comm->world && result == kSuccess; ++peer) {
    const size_t at = static_cast<size_t>(peer) * bytes;
    result = add(comm, &Comm::sends, static_cast<const char*>(send) + at, bytes, datatype, peer);
    if (result == kSuccess)
      result = add(comm, &Comm::receives, static_cast<char*>(receive) + at, bytes, datatype, peer);
  }
  return result;
}

EXPORT int ncclCommRegister(Comm* comm, void* memory, size_t, void** handle) {
  note("registered");
  comm->registered.push_back(memory);
  *handle = memory;
  return kSuccess;
}

EXPORT int ncclCommDeregister(Comm* comm, void* handle) {
  auto& registered = comm->registered;
  for (auto known = registered.begin(); known != registered.end(); ++known) {
    if (*known != handle) continue;
    note("registered no more");
    registered.erase(known);
    return kSuccess;
  }
  return kInvalidArgument;
}
#endif
