// The functions that g++'s -fsanitize=thread calls, as a counter of bytes; compiled without it.
#include "access_counts.h"

namespace samoe {
namespace access {
namespace {

struct Buffer {
  uintptr_t begin, end;
  Kind kind;
  std::vector<bool> read, written;
};

std::vector<Buffer> buffers;
Counts counts;
std::size_t last = 0;  // the buffer of the last access, most likely the next one's

Buffer* buffer_at(uintptr_t place) {
  if (last < buffers.size() && place >= buffers[last].begin && place < buffers[last].end) return &buffers[last];
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    if (place >= buffers[i].begin && place < buffers[i].end) return &buffers[last = i];
  }
  return nullptr;
}

void touch(Kind kind, std::vector<bool>& bytes, int64_t& all, int64_t& touched, std::size_t first, std::size_t size) {
  if (kind == Kind::data) all += static_cast<int64_t>(size);
  for (std::size_t i = first; i < first + size; ++i) {
    touched += bytes[i] ? 0 : 1;
    all += bytes[i] || kind == Kind::data ? 0 : 1;
    bytes[i] = true;
  }
}

void note(const void* p, std::size_t size, bool writes) {
  const uintptr_t place = reinterpret_cast<uintptr_t>(p);
  Buffer* const buffer = buffer_at(place);
  if (buffer == nullptr) return;  // a thread's own memory, a block's shared memory, or the host's
  const std::size_t first = place - buffer->begin;
  if (writes) {
    touch(Kind::data, buffer->written, counts.written, counts.touched_written, first, size);
  } else {
    touch(buffer->kind, buffer->read, counts.read, counts.touched_read, first, size);
  }
}

}  // namespace

void watch(const void* begin, int64_t num_bytes, Kind kind) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  const std::size_t size = static_cast<std::size_t>(num_bytes);
  buffers.push_back({first, first + size, kind, std::vector<bool>(size), std::vector<bool>(size)});
}

Counts take() {
  const Counts taken = counts;
  counts = Counts();
  buffers.clear();
  return taken;
}

}  // namespace access
}  // namespace samoe

using samoe::access::note;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(const void* p, unsigned long size) { note(p, size, false); }
void __tsan_write_range(const void* p, unsigned long size) { note(p, size, true); }
#define SAMOE_ACCESS(size)                                                          \
  void __tsan_read##size(const void* p) { note(p, size, false); }                   \
  void __tsan_write##size(const void* p) { note(p, size, true); }                   \
  void __tsan_unaligned_read##size(const void* p) { note(p, size, false); }         \
  void __tsan_unaligned_write##size(const void* p) { note(p, size, true); }
SAMOE_ACCESS(1)
SAMOE_ACCESS(2)
SAMOE_ACCESS(4)
SAMOE_ACCESS(8)
SAMOE_ACCESS(16)
#undef SAMOE_ACCESS
}
