// The system calls of a wait.
#pragma once

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <ctime>

namespace samoe {
namespace comm {

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t value, double seconds) {
  timespec time;
  time.tv_sec = static_cast<time_t>(seconds);
  time.tv_nsec = static_cast<long>((seconds - static_cast<double>(time.tv_sec)) * 1e9);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &time, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A pidfd becomes readable when its process has ended. kill(pid, 0) would take a zombie for alive.
inline bool has_ended(int pidfd) {
  if (pidfd < 0) return false;
  pollfd request = {pidfd, POLLIN, 0};
  return poll(&request, 1, 0) > 0;
}

inline int open_pidfd(int pid) {
  constexpr int kPidfdOpen = 434;  // SYS_pidfd_open, missing from older headers
  return static_cast<int>(syscall(kPidfdOpen, pid, 0));
}

}  // namespace comm
}  // namespace samoe
