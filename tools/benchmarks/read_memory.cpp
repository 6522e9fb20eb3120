// Reading of memory and nothing else: the bound of what decodes. memory.py compiles it for the processor that it runs on.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

typedef uint64_t Line __attribute__((vector_size(64)));

constexpr int64_t kStreams = 4;
constexpr int64_t kAheadLines = 256;

// Several streams, which the processor foresees by itself.
Line read_streams(const Line* lines, int64_t count) {
  Line sums[kStreams] = {};
  const int64_t part = count / kStreams;
  for (int64_t i = 0; i < part; ++i) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) sums[s] |= lines[s * part + i];
  }
  return (sums[0] | sums[1]) | (sums[2] | sums[3]);
}

// One stream that is asked for ahead.
Line read_stream(const Line* lines, int64_t count) {
  Line sums[kStreams] = {};
  for (int64_t i = 0; i + kStreams <= count; i += kStreams) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) {
      __builtin_prefetch(lines + i + s + kAheadLines, 0, 2);
      sums[s] |= lines[i + s];
    }
  }
  return (sums[0] | sums[1]) | (sums[2] | sums[3]);
}

}  // namespace

// Reads whole lines, which begin at a multiple of 64; each thread a part. Returns what the compiler may not leave out.
extern "C" uint64_t read_memory(const void* data, int64_t bytes, int num_threads, int asks) {
  const int64_t part = bytes / 64 / num_threads;
  std::atomic<uint64_t> found{0};
  std::vector<std::thread> threads;
  const auto read = [&](int thread) {
    const Line* lines = static_cast<const Line*>(data) + thread * part;
    const Line sum = asks != 0 ? read_stream(lines, part) : read_streams(lines, part);
    for (int i = 0; i < 8; ++i) found |= sum[i];
  };
  for (int thread = 1; thread < num_threads; ++thread) threads.emplace_back(read, thread);
  read(0);
  for (std::thread& thread : threads) thread.join();
  return found;
}
