// The stream in which a GPU does exchanges, and events in it.
#pragma once

#include <functional>
#include <memory>

#include "cuda_runtime.h"
#include "nccl_all_to_all.h"

namespace samoe {
namespace comm {

// Throws where CUDA's runtime reports an error.
class CudaQueue : public DeviceQueue {
 public:
  // stream: of the exchanges; it stays its maker's. caller_stream: the stream that the calling thread works in now.
  CudaQueue(const CudaRuntime* cuda, int device, void* stream, std::function<void*()> caller_stream);
  void* stream() override { return stream_; }
  void follow_caller() override;
  std::unique_ptr<Mark> mark() override;
  void enter_thread() override;

 private:
  const CudaRuntime* const cuda_;
  const int device_;
  void* const stream_;
  const std::function<void*()> caller_stream_;
};

}  // namespace comm
}  // namespace samoe
