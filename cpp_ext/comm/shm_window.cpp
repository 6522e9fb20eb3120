#include "shm_window.h"

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

constexpr uint64_t kUnit = uint64_t{2} << 20;  // sizes are multiples of a huge page
constexpr int kPopulateWrite = 23;             // MADV_POPULATE_WRITE, missing from older headers

std::string failure(const std::string& call) { return call + ": " + std::strerror(errno); }

uint64_t rounded(uint64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

}  // namespace

Mapping::~Mapping() {
  if (base != nullptr && owned) munmap(base, bytes);
}

std::string Window::create() {
  fd_ = static_cast<int>(syscall(SYS_memfd_create, "megatron_samoe_window", 1u /* MFD_CLOEXEC */));
  return fd_ < 0 ? failure("memfd_create") : "";
}

std::string Window::open(pid_t pid, int fd) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  return fd_ < 0 ? failure("open " + path) : "";
}

std::string Window::map(int buffer, uint64_t bytes) {
  const off_t offset = static_cast<off_t>(static_cast<uint64_t>(buffer) * kBufferStride);
  // At a multiple of a huge page, which the kernel gives on advice and where it falls so.
  void* space = mmap(nullptr, bytes + kUnit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return failure("mmap of " + std::to_string(bytes) + " bytes of addresses");
  char* start = static_cast<char*>(space);
  char* base = start + (kUnit - reinterpret_cast<uintptr_t>(start) % kUnit) % kUnit;
  if (base != start) munmap(start, static_cast<size_t>(base - start));
  if (base + bytes != start + bytes + kUnit) munmap(base + bytes, static_cast<size_t>(start + kUnit - base));
  if (mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_, offset) == MAP_FAILED) {
    const std::string problem = failure("mmap of " + std::to_string(bytes) + " shared bytes");
    munmap(base, bytes);
    return problem;
  }
  madvise(base, bytes, MADV_HUGEPAGE);
  // The mapping before this one lives on with the tensors that lie in it.
  buffers_[buffer] = std::make_shared<Mapping>();
  buffers_[buffer]->base = base;
  buffers_[buffer]->bytes = bytes;
  return "";
}

std::string Window::grow(int buffer, uint64_t bytes) {
  if (bytes == 0) bytes = 1;
  if (buffers_[buffer] != nullptr && buffers_[buffer]->bytes >= bytes) return "";
  const uint64_t capacity = rounded(bytes + bytes / 4);  // sizes of uneven exchanges vary from step to step
  if (capacity > kBufferStride) return std::to_string(bytes) + " bytes are more than a window holds";
  const off_t offset = static_cast<off_t>(static_cast<uint64_t>(buffer) * kBufferStride);
  struct stat status;
  if (fstat(fd_, &status) != 0) return failure("fstat");
  const off_t end = offset + static_cast<off_t>(capacity);
  if (status.st_size < end && ftruncate(fd_, end) != 0)
    return failure("ftruncate to " + std::to_string(capacity) + " bytes");
  const std::string problem = map(buffer, capacity);
  if (!problem.empty()) return problem;
  // Memory that is not there is an error here, not a bus error at the first write. Older kernels know only the second
  // way, which gives no huge pages.
  if (madvise(buffers_[buffer]->base, capacity, kPopulateWrite) == 0) return "";
  if (errno == EINVAL && fallocate(fd_, 0, offset, static_cast<off_t>(capacity)) == 0) return "";
  const std::string missing = failure("memory for a window of " + std::to_string(capacity) + " bytes");
  buffers_[buffer].reset();
  return missing;
}

std::string Window::read(uint64_t place, uint64_t capacity, const char** data) {
  const int buffer = buffer_of(place);
  const uint64_t offset = place - static_cast<uint64_t>(buffer) * kBufferStride;
  if (shared_ != nullptr) {
    *data = shared_->buffers_[buffer]->base + offset;
    return "";
  }
  if (buffers_[buffer] == nullptr || buffers_[buffer]->bytes < capacity) {
    const std::string problem = map(buffer, capacity);
    if (!problem.empty()) return problem;
  }
  *data = buffers_[buffer]->base + offset;
  return "";
}

bool Window::place_of(const char* data, uint64_t bytes, uint64_t* place, uint64_t* capacity) const {
  for (int b = 0; b < 2; ++b) {
    const Mapping* mapping = buffers_[b].get();
    if (mapping == nullptr || data < mapping->base || data + bytes > mapping->base + mapping->bytes) continue;
    *place = static_cast<uint64_t>(b) * kBufferStride + static_cast<uint64_t>(data - mapping->base);
    *capacity = mapping->bytes;
    return true;
  }
  return false;
}

void Window::release() {
  for (auto& buffer : buffers_) buffer.reset();
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

}  // namespace comm
}  // namespace samoe
