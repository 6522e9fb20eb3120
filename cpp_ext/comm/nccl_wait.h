// Waits for NCCL, which are looks at it: it has no call that sleeps for a time.
#pragma once

#include <chrono>
#include <thread>

#include "nccl_api.h"

namespace samoe {
namespace comm {

inline std::chrono::steady_clock::duration duration(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
}

inline bool accepted(int result) { return result == kNcclSuccess || result == kNcclInProgress; }

// Between two looks: enqueueing takes a few microseconds, so the first follow at once.
inline void pause(int* looks) {
  constexpr int kYields = 200;
  if (++*looks < kYields) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace comm
}  // namespace samoe
