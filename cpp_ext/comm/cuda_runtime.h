// What an exchange on a GPU needs of CUDA's runtime, found at run time in the copy that torch has loaded: the library
// is built without CUDA.
#pragma once

#include <string>

namespace samoe {
namespace comm {

// Each call returns 0, or CUDA's error; streams and events are CUDA's handles.
struct CudaRuntime {
  int (*set_device)(int device);
  int (*create_event)(void** event, unsigned flags);
  int (*destroy_event)(void* event);
  int (*record_event)(void* event, void* stream);
  int (*query_event)(void* event);
  int (*wait_for_event)(void* stream, void* event, unsigned flags);
  int (*exchange_capture_mode)(int* mode);  // of the calling thread
  const char* (*error_text)(int error);
};

constexpr int kCudaNotReady = 600;
constexpr unsigned kCudaEventWithoutTiming = 2;
constexpr int kCudaCaptureThreadLocal = 1;

// Null where this process has loaded no such library, and then why.
const CudaRuntime* cuda_runtime(std::string* why);

}  // namespace comm
}  // namespace samoe
