// y = sqrt(softplus(x)) of n numbers and its gradient. g++ compiles it for the CPU, nvcc (-x cu) for CUDA.
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DEVICE __host__ __device__
#else
#define DEVICE
#endif

namespace {
// Far below zero softplus(x) is exp(x), whose root does not vanish as early.
DEVICE float value(float x) { return x < -15.f ? expf(x / 2) : sqrtf(fmaxf(x, 0.f) + log1pf(expf(-fabsf(x)))); }

DEVICE float slope(float x) { return x < -15.f ? expf(x / 2) / 2 : 1 / (1 + expf(-x)) / (2 * value(x)); }

#ifdef __CUDACC__
__global__ void forward_kernel(float* y, const float* x, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    y[i] = value(x[i]);
}
__global__ void backward_kernel(float* dx, const float* x, const float* dy, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    dx[i] = dy[i] * slope(x[i]);
}
unsigned blocks(int64_t n) { return static_cast<unsigned>(n < 1 << 20 ? (n + 255) / 256 : 4096); }
#endif
}  // namespace

#ifdef __CUDACC__
extern "C" void forward(float* y, const float* x, int64_t n, void* stream) {
  if (n > 0) forward_kernel<<<blocks(n), 256, 0, static_cast<cudaStream_t>(stream)>>>(y, x, n);
}
extern "C" void backward(float* dx, const float* x, const float* dy, int64_t n, void* stream) {
  if (n > 0) backward_kernel<<<blocks(n), 256, 0, static_cast<cudaStream_t>(stream)>>>(dx, x, dy, n);
}
#else
extern "C" void forward(float* y, const float* x, int64_t n, void*) {
  for (int64_t i = 0; i < n; ++i) y[i] = value(x[i]);
}
extern "C" void backward(float* dx, const float* x, const float* dy, int64_t n, void*) {
  for (int64_t i = 0; i < n; ++i) dx[i] = dy[i] * slope(x[i]);
}
#endif
