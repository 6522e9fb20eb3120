#include "shm_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace samoe {
namespace comm {
namespace {

constexpr uint64_t kMagic = 0x53614d6f45613262;  // also tells a layout of another version: change it with the layout

size_t segment_bytes(int world) {
  return sizeof(Header) + static_cast<size_t>(world) * (sizeof(Ring) + sizeof(Pull) + kSlots * sizeof(Slot));
}

std::string failure(const std::string& call) { return call + ": " + std::strerror(errno); }

}  // namespace

std::string Segment::map(size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (base == MAP_FAILED) return failure("mmap of " + std::to_string(bytes) + " shared bytes");
  base_.reset(static_cast<char*>(base), [bytes](char* mapped) { munmap(mapped, bytes); });
  return "";
}

std::string Segment::create(int world, uint64_t mark) {
  const std::string problem = try_create(world, mark);
  if (!problem.empty()) release();
  return problem;
}

std::string Segment::open(pid_t pid, int fd, int world, uint64_t mark) {
  const std::string problem = try_open(pid, fd, world, mark);
  if (!problem.empty()) release();
  return problem;
}

std::string Segment::try_create(int world, uint64_t mark) {
  world_ = world;
  fd_ = static_cast<int>(syscall(SYS_memfd_create, "megatron_samoe", 1u /* MFD_CLOEXEC */));
  if (fd_ < 0) return failure("memfd_create");
  const size_t bytes = segment_bytes(world);
  if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0)
    return failure("ftruncate to " + std::to_string(bytes) + " bytes");
  // Memory that is not there is an error here, not a bus error at the first write.
  if (fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) != 0 && errno != EOPNOTSUPP)
    return failure("fallocate of " + std::to_string(bytes) + " bytes");
  const std::string problem = map(bytes);
  if (!problem.empty()) return problem;
  // Fresh pages are zero: every counter starts at 0 and the state is open.
  header().magic = kMagic;
  header().mark = mark;
  header().world = static_cast<uint32_t>(world);
  return "";
}

std::string Segment::try_open(pid_t pid, int fd, int world, uint64_t mark) {
  world_ = world;
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0) return failure("open " + path);
  struct stat status;
  if (fstat(fd_, &status) != 0) return failure("fstat " + path);
  if (static_cast<size_t>(status.st_size) != segment_bytes(world)) return path + " is not the peer's segment";
  const std::string problem = map(segment_bytes(world));
  if (!problem.empty()) return problem;
  const Header& found = header();
  if (found.magic != kMagic || found.mark != mark || found.world != static_cast<uint32_t>(world)) {
    return path + " is not the peer's segment";
  }
  return "";
}

void Segment::share(const Segment& other) {
  base_ = other.base_;
  world_ = other.world_;
  fd_ = dup(other.fd_);
}

void Segment::release() {
  base_.reset();
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Ring& Segment::ring(int peer) const {
  char* rings = base_.get() + sizeof(Header);
  return reinterpret_cast<Ring*>(rings)[peer];
}

Pull& Segment::pull(int peer) const {
  char* pulls = base_.get() + sizeof(Header) + static_cast<size_t>(world_) * sizeof(Ring);
  return reinterpret_cast<Pull*>(pulls)[peer];
}

Slot& Segment::slot(int peer, uint64_t piece) const {
  char* slots = base_.get() + sizeof(Header) + static_cast<size_t>(world_) * (sizeof(Ring) + sizeof(Pull));
  return reinterpret_cast<Slot*>(slots)[static_cast<uint64_t>(peer) * kSlots + piece % kSlots];
}

}  // namespace comm
}  // namespace samoe
