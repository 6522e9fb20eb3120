// A library with NCCL's interface over sockets and host memory, for tests of everything around NCCL on machines without
// a GPU: order, splits, deadlines, errors, aborts. It is non-blocking as NCCL is with blocking = 0:
// ncclCommGetAsyncError says "in progress" at the first looks after a group of calls, at one on even ranks and at three
// (or FAKE_NCCL_LOOKS) on odd ones, and then the group is launched. A thread per communicator does its groups, late and
// in the device's order (fake_device.h), and memory that is received into is poisoned until then.
//
// FAKE_NCCL_FAULT=RANK:EXCHANGE:KIND makes one rank misbehave in one group (0 is the first): error, hang or exit. Of the
// kinds finalize and destroy the call of that name never ends; of the kind connect the group is never enqueued, as where a
// peer does not come. With FAKE_NCCL_QUIET set peers do not hear of a communicator's end, as over NVLink. With
// FAKE_NCCL_OLD defined it lacks what only newer releases have. FAKE_NCCL_VERSION is what it says of itself.
#include <climits>
#include <cstdio>
#include <cstring>
#include <random>

#include "fake_nccl_comm.h"

namespace {

struct UniqueId {
  char internal[128];
};

thread_local std::vector<Comm*> group_comms;
thread_local int group_depth = 0;

int add(Comm* comm, std::vector<Transfer> Comm::* list, const void* data, size_t count, int datatype, int peer) {
  if (group_depth == 0 || comm->state != kSuccess || comm->looks > 0) return kInvalidUsage;
  if (datatype != 1 || peer < 0 || peer >= comm->world) return kInvalidArgument;
  Transfer transfer;
  transfer.peer = peer;
  transfer.data = static_cast<char*>(const_cast<void*>(data));
  transfer.bytes = transfer.expected = transfer.length = count;
  (comm->*list).push_back(transfer);
  if (list == &Comm::sends) note("sends to " + std::to_string(peer));
  for (const Comm* known : group_comms)
    if (known == comm) return kSuccess;
  group_comms.push_back(comm);
  return kSuccess;
}

}  // namespace

// "sends to N" and the names of calls: how often, on all communicators of this process.
EXPORT int64_t megatron_samoe_stand_in_count(const char* what) {
  std::lock_guard<std::mutex> lock(count_mutex);
  return counts[what];
}

EXPORT int ncclGetVersion(int* version) {
  const char* said = std::getenv("FAKE_NCCL_VERSION");
  *version = said ? std::atoi(said) : 21801;
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

EXPORT const char* ncclGetLastError(void*) {
  thread_local std::string text;
  std::lock_guard<std::mutex> lock(count_mutex);
  text = last_error;
  return text.c_str();
}

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
  note("ncclCommInitRankConfig");
  comm->worker = std::thread(work, comm);
  *out = comm;
  return kInProgress;
}

EXPORT int ncclCommGetAsyncError(Comm* comm, int* state) {
  *state = comm->state;
  if (*state == kSuccess && comm->looks > 0) {
    if (--comm->looks == 0) launch_enqueued(comm);
    *state = kInProgress;
  }
  return kSuccess;
}

EXPORT int ncclCommFinalize(Comm* comm) {
  note("ncclCommFinalize");
  if (comm->state != kSuccess) return kInvalidUsage;
  comm->state = kInProgress;
  comm->leaving = true;
  return kInProgress;
}

EXPORT int ncclCommDestroy(Comm* comm) {
  note("ncclCommDestroy");
  if (!comm->finalized) return kInvalidUsage;
  while (fault_of(*comm) == "destroy") std::this_thread::sleep_for(std::chrono::seconds(1));
  release(comm);
  return kSuccess;
}

EXPORT int ncclCommAbort(Comm* comm) {
  note("ncclCommAbort");
  release(comm);
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
    enqueue(comm);
    const char* looks = std::getenv("FAKE_NCCL_LOOKS");
    const int odd = looks != nullptr ? std::atoi(looks) : 3;
    comm->looks = fault_of(*comm) == "connect" ? INT_MAX : comm->rank % 2 == 0 ? 1 : odd;
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
  note("ncclCommRegister");
  comm->registered.push_back(memory);
  *handle = memory;
  return kSuccess;
}

EXPORT int ncclCommDeregister(Comm* comm, void* handle) {
  auto& registered = comm->registered;
  for (auto known = registered.begin(); known != registered.end(); ++known) {
    if (*known != handle) continue;
    note("ncclCommDeregister");
    registered.erase(known);
    return kSuccess;
  }
  return kInvalidArgument;
}
#endif
