// A library with NCCL's interface over sockets and host memory, for tests of everything around NCCL on machines without
// a GPU: order, splits, deadlines, errors, aborts. It is non-blocking as NCCL is with blocking = 0: work goes to a
// thread and ncclCommGetAsyncError says "in progress" until it is done.
//
// FAKE_NCCL_FAULT=RANK:EXCHANGE:KIND makes one rank misbehave in one exchange (0 is the first): error, hang or exit.
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

struct Comm {
  int rank = 0, world = 0;
  std::string name;
  int listener = -1;
  std::vector<int> sockets;
  std::atomic<int> state{kInProgress};
  std::atomic<bool> stop{false};
  std::thread worker;
  int exchange = 0;
  std::vector<Transfer> sends, receives;
};

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

void copy_own(Comm& comm) {
  for (Transfer& send : comm.sends) {
    if (send.peer != comm.rank) continue;
    for (Transfer& receive : comm.receives) {
      if (receive.peer != comm.rank) continue;
      if (send.bytes == receive.bytes) std::memcpy(receive.data, send.data, send.bytes);
      receive.moved = 8 + receive.bytes;
    }
    send.moved = 8 + send.bytes;
  }
}

bool has_fault(const Comm& comm, std::string* kind) {
  const char* fault = std::getenv("FAKE_NCCL_FAULT");
  int rank = -1, exchange = -1;
  char text[16] = {};
  if (fault == nullptr || std::sscanf(fault, "%d:%d:%15s", &rank, &exchange, text) != 3) return false;
  *kind = text;
  return rank == comm.rank && exchange == comm.exchange - 1;
}

// Returns whether the exchange was done.
bool run_exchange(Comm* comm) {
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
  copy_own(*comm);
  while (!comm->stop) {
    bool finished = true;
    std::vector<pollfd> requests;
    for (auto* list : {&comm->sends, &comm->receives}) {
      const bool sending = list == &comm->sends;
      for (Transfer& transfer : *list) {
        if (transfer.done()) continue;
        if (!advance(*comm, transfer, sending)) return false;
        if (transfer.done()) continue;
        finished = false;
        requests.push_back(
            {comm->sockets[static_cast<size_t>(transfer.peer)], static_cast<short>(sending ? POLLOUT : POLLIN), 0});
      }
    }
    if (finished) {
      return true;
    }
    poll(requests.data(), requests.size(), 5);
  }
  return false;
}

int add(Comm* comm, std::vector<Transfer> Comm::* list, const void* data, size_t count, int datatype, int peer) {
  if (group_depth == 0 || comm->state != kSuccess) return kInvalidUsage;
  if (datatype != 1 || peer < 0 || peer >= comm->world) return kInvalidArgument;
  Transfer transfer;
  transfer.peer = peer;
  transfer.data = static_cast<char*>(const_cast<void*>(data));
  transfer.bytes = transfer.length = count;
  (comm->*list).push_back(transfer);
  for (const Comm* known : group_comms)
    if (known == comm) return kSuccess;
  group_comms.push_back(comm);
  return kSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// What tells this library from a real one: it takes host memory.
EXPORT int megatron_samoe_fake_nccl() { return 1; }

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
  comm->worker = std::thread(connect_all, comm);
  *out = comm;
  return kInProgress;
}

EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
  *state = comm->state;
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
    if (comm->worker.joinable()) comm->worker.join();
    ++comm->exchange;
    comm->state = kInProgress;
    comm->worker = std::thread([comm] {
      const bool done = run_exchange(comm);
      comm->sends.clear();
      comm->receives.clear();
      if (done) comm->state = kSuccess;  // last: from here on the caller adds to the lists
    });
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
