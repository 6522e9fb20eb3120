// What the CUDA kernels share. Compiled by nvcc, or by a host compiler over the emulation of testing/.
#pragma once

#include <cassert>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "../../testing/stand_ins/cuda_emulation.h"
#endif

#include "launchers.h"

#define SAMOE_DEVICE static __device__ __forceinline__

namespace samoe {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(__CUDACC__)
// Returns what became of this launch, where <<<>>> would leave it among other errors of the thread.
template <typename... Parameters>
cudaError_t start_kernel(void (*kernel)(Parameters...), unsigned num_blocks, cudaStream_t stream, Parameters... arguments) {
  void* places[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(num_blocks), dim3(kThreads), places, 0, stream);
}
#endif

void note_launch(cudaError_t error, cudaStream_t stream);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t num_blocks, cudaStream_t stream, Arguments... arguments) {
  if (num_blocks == 0) return;
  note_launch(start_kernel(kernel, static_cast<unsigned>(num_blocks), stream, static_cast<Parameters>(arguments)...), stream);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SAMOE_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
SAMOE_DEVICE int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }
// The warp's number in the grid: kernels that give one warp a row, a token or a run.
SAMOE_DEVICE int64_t global_warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread(); }

// Butterflies: every lane gets the same bits.
template <typename T>
SAMOE_DEVICE T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
template <typename T>
SAMOE_DEVICE T warp_max(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Sums N values over the lanes, step by step half as many of them, until a lane has Kept sums in front: those from the
// returned index on. A recursion, because a loop that is not unrolled would put the values into memory.
template <int N, int Kept, int Step = kWarp / 2, int Size>
SAMOE_DEVICE int sum_scattered(float (&values)[Size]) {
  if constexpr (N == Kept) {
    return 0;
  } else {
    constexpr int kHalf = N / 2;
    const bool upper = (lane_of_thread() & Step) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[i + kHalf] : values[i], given = upper ? values[i] : values[i + kHalf];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, Step);
    }
    return (upper ? kHalf : 0) + sum_scattered<kHalf, Kept, Step / 2>(values);
  }
}

// The sum over the block in thread 0; the others get partial sums.
template <typename T>
SAMOE_DEVICE T block_sum(T value) {
  __shared__ T sums[kWarps];
  value = warp_sum(value);
  if (lane_of_thread() == 0) sums[warp_of_thread()] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) value += sums[warp];
  }
  return value;
}

// bf16 as raw bits, rounded to nearest even, NaN kept a NaN: the bits of the CPU kernels.
SAMOE_DEVICE float to_float(float x) { return x; }
SAMOE_DEVICE float to_float(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
template <typename T>
SAMOE_DEVICE T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ uint16_t from_float<uint16_t>(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// V elements that are read and written by one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};
template <int V, typename T>
SAMOE_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, typename T>
SAMOE_DEVICE void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Elements in an access of 16 bytes.
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of a number of elements can be read 16 bytes at a time from all these places.
template <typename T, typename... Places>
bool is_wide(int64_t num_elements, Places... places) {
  return num_elements % kWide<T> == 0 && (is_aligned(places) && ...);
}

}  // namespace cuda
}  // namespace samoe
