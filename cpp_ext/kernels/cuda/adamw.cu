// AdamW over runs of fp32 master weights: one pass over weights, gradients and moments, one launch a run.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

template <int V>
__global__ void adamw_kernel(cpu::AdamW a, cpu::AdamWRun run) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (i >= run.num) return;
  const Pack<float, V> grads = load<V>(run.grad + i);
  Pack<float, V> exp_avg = load<V>(run.exp_avg + i), exp_avg_sq = load<V>(run.exp_avg_sq + i);
  Pack<float, V> master = load<V>(run.master + i);
  Pack<uint16_t, V> weight;
  for (int v = 0; v < V; ++v) {
    const float grad = grads.at[v] * a.grad_scale;
    exp_avg.at[v] += (grad - exp_avg.at[v]) * a.rest1;
    exp_avg_sq.at[v] = exp_avg_sq.at[v] * a.beta2 + grad * grad * a.rest2;
    master.at[v] = master.at[v] * a.decay -
                   a.step_size * exp_avg.at[v] / (sqrtf(exp_avg_sq.at[v]) * a.inverse_root + a.eps);
    weight.at[v] = from_float<uint16_t>(master.at[v]);
  }
  store<V>(run.exp_avg + i, exp_avg);
  store<V>(run.exp_avg_sq + i, exp_avg_sq);
  store<V>(run.master + i, master);
  if (run.weight != nullptr) store<V>(run.weight + i, weight);
}

}  // namespace

void adamw(const cpu::AdamW& a, cudaStream_t stream) {
  for (int64_t r = 0; r < a.num_runs; ++r) {
    const cpu::AdamWRun& run = a.runs[r];
    const bool wide = is_wide<float>(run.num, run.master, run.grad, run.exp_avg, run.exp_avg_sq) &&
                      reinterpret_cast<uintptr_t>(run.weight) % 8 == 0;
    launch(wide ? adamw_kernel<4> : adamw_kernel<1>, ceil_div(run.num, kThreads * (wide ? 4 : 1)), stream, a, run);
  }
}

}  // namespace cuda
}  // namespace samoe
