// Questions to the current device.
#include "device.cuh"

namespace samoe {
namespace cuda {

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace samoe
