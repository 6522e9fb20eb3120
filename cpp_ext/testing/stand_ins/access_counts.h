// Bytes that emulated kernels read and write in the buffers of a device. The kernels are compiled with
// -fsanitize=thread and linked without its library: g++ then calls a function before each access to memory, and
// access_counts.cpp has these functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace samoe {
namespace access {

// Accesses that a GPU's cache would answer count, too; `touched` are the bytes that any of them met.
struct Counts {
  int64_t read = 0, written = 0, touched_read = 0, touched_written = 0;
};

// What is read: `data`, each access of which counts; or a `table`, of which the lanes of a warp read the same element, in one
// access of the device, so that a byte counts once.
enum class Kind { data, table };

// Makes a buffer's accesses count. It must live, unmoved, until `take`.
void watch(const void* begin, int64_t num_bytes, Kind kind);

// Returns what was counted since the last call, and forgets all buffers.
Counts take();

template <typename T>
std::vector<T> watched(std::vector<T> values, Kind kind = Kind::data) {
  watch(values.data(), static_cast<int64_t>(values.size() * sizeof(T)), kind);
  return values;  // moved, so its elements stay where they are
}

}  // namespace access
}  // namespace samoe
