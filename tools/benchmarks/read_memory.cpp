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

// One stream that is asked for ahead from several pages in turn: an Intel core foresees a page at a time.
Line read_pages(const Line* lines, int64_t count) {
  constexpr int64_t kPages = 8, kPageLines = 64, kGroup = kPages * kPageLines;
  Line sums[kPages] = {};
  for (int64_t i = 0; i + kGroup <= count; i += kGroup) {
    for (int64_t line = 0; line < kPageLines; ++line) {
#pragma GCC unroll 8
      for (int64_t page = 0; page < kPages; ++page) {
        __builtin_prefetch(lines + i + kGroup + page * kPageLines + line, 0, 3);
        sums[page] |= lines[i + line * kPages + page];
      }
    }
  }
  return ((sums[0] | sums[1]) | (sums[2] | sums[3])) | ((sums[4] | sums[5]) | (sums[6] | sums[7]));
}

}  // namespace

// Reads whole lines, which begin at a multiple of 64; each thread a part. Returns what the compiler may not leave out.
extern "C" uint64_t read_memory(const void* data, int64_t bytes, int num_threads, int way) {
  const int64_t part = bytes / 64 / num_threads;
  std::atomic<uint64_t> found{0};
  std::vector<std::thread> threads;
  const auto read = [&](int thread) {
    const Line* lines = static_cast<const Line*>(data) + thread * part;
    const Line sum = way == 0 ? read_streams(lines, part) : way == 1 ? read_stream(lines, part) : read_pages(lines, part);
    for (int i = 0; i < 8; ++i) found |= sum[i];
  };
  for (int thread = 1; thread < num_threads; ++thread) threads.emplace_back(read, thread);
  read(0);
  for (std::thread& thread : threads) thread.join();
  return found;
}
