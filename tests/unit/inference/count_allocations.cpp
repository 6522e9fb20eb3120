// Preloaded into a process: counts what it asks the C library for in pieces of kLeast bytes or more, between start and stop.
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

namespace {
constexpr size_t kLeast = 1024;
std::atomic<bool> counting{false};
std::atomic<long> count{0};
void note(size_t bytes) {
  if (bytes >= kLeast && counting.load(std::memory_order_relaxed)) count.fetch_add(1, std::memory_order_relaxed);
}
}  // namespace

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) {
  note(bytes);
  return __libc_malloc(bytes);
}
void* calloc(size_t n, size_t bytes) {
  note(n * bytes);
  return __libc_calloc(n, bytes);
}
void* realloc(void* old, size_t bytes) {
  note(bytes);
  return __libc_realloc(old, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  note(bytes);
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  note(bytes);
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
void start_counting() {
  count = 0;
  counting = true;
}
long stop_counting() {
  counting = false;
  return count;
}
}
