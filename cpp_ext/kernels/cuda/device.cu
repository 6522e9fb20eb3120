// What became of launches.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

thread_local LaunchError first = {nullptr, false};

}  // namespace

void note_launch(cudaError_t error, cudaStream_t stream) {
  if (error == cudaSuccess || first.text != nullptr) return;
  // A launch that is refused leaves the device as it was. After a kernel that failed it gives this one answer to all calls.
  first = {cudaGetErrorString(error), cudaStreamQuery(stream) == error};
  cudaGetLastError();  // or whoever looks for an error of his own next would find this one
}

LaunchError launch_error() {
  const LaunchError found = first;
  first = {nullptr, false};
  return found;
}

}  // namespace cuda
}  // namespace samoe
