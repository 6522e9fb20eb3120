// Memory in which a rank lays out what it will send, so that its peers copy it from there: one copy in place of two.
//
// A window is an anonymous file with two buffers: while peers still read one, the next message is written into the
// other. A buffer grows when a larger message comes; peers map what they need when they need it. A message's
// place is its offset in the file, in which the second buffer begins at kBufferStride.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace samoe {
namespace comm {

constexpr uint64_t kBufferStride = uint64_t{1} << 36;  // 64 GiB of a sparse file
inline int buffer_of(uint64_t place) { return place >= kBufferStride ? 1 : 0; }

// Mapped memory; unmapped with the last who holds it.
struct Mapping {
  char* base = nullptr;
  size_t bytes = 0;
  bool owned = true;
  ~Mapping();
};

class Window {
 public:
  Window() = default;
  ~Window() { release(); }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  // All return an empty string, or why it failed.
  std::string create();
  std::string open(pid_t pid, int fd);
  // Makes `bytes` of a buffer available to its owner, growing the file.
  std::string grow(int buffer, uint64_t bytes);
  // Maps a buffer of that many bytes for a reader; *data is the message at `place`.
  std::string read(uint64_t place, uint64_t capacity, const char** data);
  void release();
  // For ranks that are threads: reads the other's memory, which must outlive this.
  void share(const Window& other) { shared_ = &other; }

  std::shared_ptr<Mapping> buffer(int index) const { return buffers_[index]; }
  // The place of memory that lies in a buffer, and that buffer's size; false where it lies elsewhere.
  bool place_of(const char* data, uint64_t bytes, uint64_t* place, uint64_t* capacity) const;
  int fd() const { return fd_; }

 private:
  std::string map(int buffer, uint64_t bytes);
  std::shared_ptr<Mapping> buffers_[2];
  const Window* shared_ = nullptr;
  int fd_ = -1;
};

}  // namespace comm
}  // namespace samoe
