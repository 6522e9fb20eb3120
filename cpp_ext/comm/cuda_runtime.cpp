#include "cuda_runtime.h"

#include <dlfcn.h>

namespace samoe {
namespace comm {
namespace {

struct Search {
  CudaRuntime runtime = {};
  std::string why = "torch has loaded no CUDA runtime (libcudart)";
};

template <typename F>
bool find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function != nullptr;
}

Search search() {
  Search result;
  CudaRuntime& api = result.runtime;
  // Without a number: a library that is loaded in place of CUDA's.
  for (const char* name : {"libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"}) {
    void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const bool whole = find(library, "cudaSetDevice", &api.set_device) &&
                       find(library, "cudaEventCreateWithFlags", &api.create_event) &&
                       find(library, "cudaEventDestroy", &api.destroy_event) &&
                       find(library, "cudaEventRecord", &api.record_event) &&
                       find(library, "cudaEventQuery", &api.query_event) &&
                       find(library, "cudaStreamWaitEvent", &api.wait_for_event) &&
                       find(library, "cudaThreadExchangeStreamCaptureMode", &api.exchange_capture_mode) &&
                       find(library, "cudaGetErrorString", &api.error_text);
    result.why = whole ? "" : std::string(name) + " lacks a function of CUDA's runtime";
    break;
  }
  return result;
}

}  // namespace

const CudaRuntime* cuda_runtime(std::string* why) {
  static const Search found = search();
  *why = found.why;
  return found.why.empty() ? &found.runtime : nullptr;
}

}  // namespace comm
}  // namespace samoe
