// The device of the stand-in for NCCL: host memory, one stream, and what the exchange uses of CUDA's runtime.
//
// It has no room for two kernels: what a process launches, on whatever communicators, it does one after the other. So
// ranks that launch in different orders wait for each other without end, as they may on a GPU.
//
// The stream at address null stands for the calling thread, whose work is done when a call returns. What
// cudaStreamWaitEvent makes it wait for it has to await by megatron_samoe_stand_in_synchronize before it reads.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::mutex device_mutex;  // of the two below
std::set<int64_t> under_way;
int64_t last_launch = 0;

int64_t launch() {
  std::lock_guard<std::mutex> lock(device_mutex);
  under_way.insert(++last_launch);
  return last_launch;
}

// Whether all before it have ended.
bool has_its_turn(int64_t number) {
  std::lock_guard<std::mutex> lock(device_mutex);
  return !under_way.empty() && *under_way.begin() == number;
}

void leave_device(int64_t number) {
  std::lock_guard<std::mutex> lock(device_mutex);
  under_way.erase(number);
}

// Whether it and all before it have ended, or were aborted.
bool has_ended(int64_t number) {
  std::lock_guard<std::mutex> lock(device_mutex);
  return under_way.empty() || *under_way.begin() > number;
}

struct Event {
  int64_t launch = 0;  // that it comes after
};

constexpr int kNotReady = 600, kUnsafeInCapture = 900;
thread_local int64_t awaited = 0;
thread_local int capture_mode = 0;          // CUDA's global one, as in every new thread
std::atomic<bool> another_captures{false};  // in the global mode

}  // namespace

EXPORT int cudaSetDevice(int) { return 0; }

EXPORT int cudaEventCreateWithFlags(Event** event, unsigned) {
  *event = new Event();
  return 0;
}

EXPORT int cudaEventDestroy(Event* event) {
  delete event;
  return 0;
}

EXPORT int cudaEventRecord(Event* event, void* stream) {
  std::lock_guard<std::mutex> lock(device_mutex);
  event->launch = stream == nullptr ? 0 : last_launch;
  return 0;
}

EXPORT int cudaEventQuery(Event* event) {
  if (another_captures && capture_mode == 0) return kUnsafeInCapture;
  return has_ended(event->launch) ? 0 : kNotReady;
}

EXPORT int cudaStreamWaitEvent(void* stream, Event* event, unsigned) {
  if (stream == nullptr && event->launch > awaited) awaited = event->launch;
  return 0;
}

EXPORT int cudaThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}

EXPORT const char* cudaGetErrorString(int error) {
  return error == kUnsafeInCapture ? "operation not permitted when stream is capturing" : "unknown error";
}

// Waits for what the calling thread has to wait for, so long; returns whether that has ended, or was aborted.
EXPORT int megatron_samoe_stand_in_synchronize(double seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!has_ended(awaited)) {
    if (std::chrono::steady_clock::now() >= until) return 0;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return 1;
}

// From now on, or no more, a CUDA graph is captured in a thread that is not named.
EXPORT void megatron_samoe_stand_in_capture(int captures) { another_captures = captures != 0; }
