// AdamW over runs of fp32 master weights: one pass over weights, gradients and moments.
#include "../../kernels.h"
#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kChunk = 16384;  // elements that a thread takes at a time

SAMOE_INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int64_t i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Whole vectors. One compiled loop for all elements: were the last ones computed elsewhere, the compiler could fuse other
// multiply-adds there, and an element's bits would depend on where it lies.
__attribute__((noinline)) void update_vectors(const AdamW& a, const AdamWRun& run, int64_t num) {
  for (int64_t i = 0; i < num; i += kLanes) {
    const vf grad = load(run.grad + i) * a.grad_scale;
    vf exp_avg = load(run.exp_avg + i), exp_avg_sq = load(run.exp_avg_sq + i), weight = load(run.master + i);
    exp_avg += (grad - exp_avg) * a.rest1;
    exp_avg_sq = exp_avg_sq * a.beta2 + grad * grad * a.rest2;
    weight = weight * a.decay - a.step_size * exp_avg / (root(exp_avg_sq) * a.inverse_root + a.eps);
    store(run.exp_avg + i, exp_avg);
    store(run.exp_avg_sq + i, exp_avg_sq);
    store(run.master + i, weight);
    if (run.weight != nullptr) store(run.weight + i, weight);
  }
}

void update_range(const AdamW& a, const AdamWRun& run, int64_t begin, int64_t end) {
  const int64_t whole = (end - begin) / kLanes * kLanes, rest = end - begin - whole;
  uint16_t* weight = run.weight == nullptr ? nullptr : run.weight + begin;
  const AdamWRun part = {run.master + begin, weight, run.grad + begin, run.exp_avg + begin, run.exp_avg_sq + begin, whole};
  update_vectors(a, part, whole);
  if (rest == 0) return;
  float lanes[4][kLanes] = {};
  uint16_t rounded[kLanes];
  float* const arrays[4] = {part.master, const_cast<float*>(part.grad), part.exp_avg, part.exp_avg_sq};
  const size_t bytes = static_cast<size_t>(rest) * sizeof(float);
  for (int i = 0; i < 4; ++i) memcpy(lanes[i], arrays[i] + whole, bytes);
  update_vectors(a, {lanes[0], rounded, lanes[1], lanes[2], lanes[3], kLanes}, kLanes);
  memcpy(arrays[0] + whole, lanes[0], bytes);
  memcpy(arrays[2] + whole, lanes[2], bytes);
  memcpy(arrays[3] + whole, lanes[3], bytes);
  if (weight != nullptr) memcpy(weight + whole, rounded, static_cast<size_t>(rest) * sizeof(uint16_t));
}

}  // namespace

void adamw(const AdamW& a) {
#pragma omp parallel num_threads(a.num_threads)
  for (int64_t r = 0; r < a.num_runs; ++r) {
    const AdamWRun& run = a.runs[r];
    const int64_t chunks = (run.num + kChunk - 1) / kChunk;
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kChunk;
      update_range(a, run, begin, run.num < begin + kChunk ? run.num : begin + kChunk);
    }
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
