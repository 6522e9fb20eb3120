#include "cuda_queue.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace samoe {
namespace comm {
namespace {

void check(const CudaRuntime* cuda, int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + cuda->error_text(error));
}

class EventMark : public Mark {
 public:
  EventMark(const CudaRuntime* cuda, void* stream, std::function<void*()> caller_stream)
      : cuda_(cuda), caller_stream_(std::move(caller_stream)) {
    check(cuda_, cuda_->create_event(&event_, kCudaEventWithoutTiming));
    if (const int error = cuda_->record_event(event_, stream); error != 0) {
      cuda_->destroy_event(event_);
      check(cuda_, error);
    }
  }
  ~EventMark() override { cuda_->destroy_event(event_); }
  EventMark(const EventMark&) = delete;
  EventMark& operator=(const EventMark&) = delete;

  bool reached() override {
    const int error = cuda_->query_event(event_);
    if (error != kCudaNotReady) check(cuda_, error);
    return error == 0;
  }
  void lead_caller() override { lead(caller_stream_()); }
  void lead(void* stream) const { check(cuda_, cuda_->wait_for_event(stream, event_, 0)); }

 private:
  const CudaRuntime* const cuda_;
  const std::function<void*()> caller_stream_;
  void* event_ = nullptr;
};

}  // namespace

CudaQueue::CudaQueue(const CudaRuntime* cuda, int device, void* stream, std::function<void*()> caller_stream)
    : cuda_(cuda), device_(device), stream_(stream), caller_stream_(std::move(caller_stream)) {}

void CudaQueue::follow_caller() { EventMark(cuda_, caller_stream_(), caller_stream_).lead(stream_); }

std::unique_ptr<Mark> CudaQueue::mark() { return std::make_unique<EventMark>(cuda_, stream_, caller_stream_); }

void CudaQueue::enter_thread() {
  check(cuda_, cuda_->set_device(device_));
  // While any thread captures a CUDA graph, questions about events would break the capture without this.
  int mode = kCudaCaptureThreadLocal;
  check(cuda_, cuda_->exchange_capture_mode(&mode));
}

}  // namespace comm
}  // namespace samoe
