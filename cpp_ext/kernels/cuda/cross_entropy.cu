// Softmax cross-entropy over (a part of) the vocabulary, a block a token. The forward reads the logits once and keeps
// three numbers; the backward makes the gradient from the logits in one pass.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

// The largest of some logits, and the sum of exp(logit - peak), 0 as long as the peak is -inf. A NaN logit is never the
// peak, but makes the sum NaN.
struct PeakSum {
  float peak, sum;
};

SAMOE_DEVICE float factor(float peak, float new_peak) { return peak == new_peak ? 1.0f : expf(peak - new_peak); }

SAMOE_DEVICE PeakSum join(PeakSum a, PeakSum b) {
  const float peak = b.peak > a.peak ? b.peak : a.peak;
  return {peak, a.sum * factor(a.peak, peak) + b.sum * factor(b.peak, peak)};
}

template <typename T, int V>
__global__ void forward_kernel(cpu::CrossEntropyForward a) {
  __shared__ PeakSum of_warp[kWarps];
  const int64_t t = blockIdx.x;
  const T* row = static_cast<const T*>(a.logits_TV) + t * a.width;
  PeakSum mine = {-INFINITY, 0.0f};
  for (int64_t first = threadIdx.x * V; first < a.width; first += kThreads * V) {
    const Pack<T, V> logits = load<V>(row + first);
    float peak = mine.peak;
    for (int v = 0; v < V; ++v) peak = to_float(logits.at[v]) > peak ? to_float(logits.at[v]) : peak;
    float sum = mine.sum * factor(mine.peak, peak);
    for (int v = 0; v < V; ++v) {
      const float x = to_float(logits.at[v]);
      sum += x == -INFINITY ? 0.0f : expf(x - peak);  // their difference would be NaN where the peak is -inf too
    }
    mine = {peak, sum};
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    mine = join(mine, {__shfl_xor_sync(kAllLanes, mine.peak, step), __shfl_xor_sync(kAllLanes, mine.sum, step)});
  }
  if (lane_of_thread() == 0) of_warp[warp_of_thread()] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) mine = join(mine, of_warp[warp]);
  const int64_t label = a.labels_T[t] - a.first_id;
  a.peak_T[t] = mine.peak;
  a.sum_T[t] = mine.peak == -INFINITY && a.width > 0 ? NAN : mine.sum;  // as exp(-inf - -inf)
  a.target_T[t] = label >= 0 && label < a.width ? to_float(row[label]) : 0.0f;
}

template <typename T, int V>
__global__ void backward_kernel(cpu::CrossEntropyBackward a) {
  const int64_t t = blockIdx.x;
  const T* row = static_cast<const T*>(a.logits_TV) + t * a.width;
  T* out = static_cast<T*>(a.dlogits_TV) + t * a.width;
  const int64_t label = a.labels_T[t] - a.first_id;
  const float gradient = a.dloss_T[t], logsumexp = a.logsumexp_T[t];
  for (int64_t first = threadIdx.x * V; first < a.width; first += kThreads * V) {
    const Pack<T, V> logits = load<V>(row + first);
    Pack<T, V> dlogits;
    for (int v = 0; v < V; ++v) {
      const float value = expf(to_float(logits.at[v]) - logsumexp) * gradient;
      dlogits.at[v] = from_float<T>(first + v == label ? value - gradient : value);
    }
    store<V>(out + first, dlogits);
  }
}

template <typename T>
void forward_typed(const cpu::CrossEntropyForward& a, cudaStream_t stream) {
  launch(is_wide<T>(a.width, a.logits_TV) ? forward_kernel<T, kWide<T>> : forward_kernel<T, 1>, a.num_tokens, stream, a);
}

template <typename T>
void backward_typed(const cpu::CrossEntropyBackward& a, cudaStream_t stream) {
  const bool wide = is_wide<T>(a.width, a.logits_TV, a.dlogits_TV);
  launch(wide ? backward_kernel<T, kWide<T>> : backward_kernel<T, 1>, a.num_tokens, stream, a);
}

}  // namespace

void cross_entropy_forward(const cpu::CrossEntropyForward& a, cudaStream_t stream) {
  (a.dtype == DType::f32 ? forward_typed<float> : forward_typed<uint16_t>)(a, stream);
}

void cross_entropy_backward(const cpu::CrossEntropyBackward& a, cudaStream_t stream) {
  (a.dtype == DType::f32 ? backward_typed<float> : backward_typed<uint16_t>)(a, stream);
}

}  // namespace cuda
}  // namespace samoe
