// AdamW over runs of fp32 master weights: one pass over weights, gradients and moments, one launch for up to 64 runs.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

// Runs go by value to the kernel, whose arguments may take 4 KB.
constexpr int kRunsOfLaunch = 64;

struct Runs {
  int64_t first_block[kRunsOfLaunch + 1];  // of each run, then the number of blocks
  cpu::AdamWRun run[kRunsOfLaunch];
  int num_runs;
};
static_assert(sizeof(cpu::AdamW) + sizeof(Runs) <= 4096, "too much for a kernel's arguments");

// Whether four elements can be read and written at a time.
SAMOE_DEVICE bool is_wide_run(const cpu::AdamWRun& run) {
  const uintptr_t places = reinterpret_cast<uintptr_t>(run.master) | reinterpret_cast<uintptr_t>(run.grad) |
                           reinterpret_cast<uintptr_t>(run.exp_avg) | reinterpret_cast<uintptr_t>(run.exp_avg_sq);
  return run.num % 4 == 0 && places % 16 == 0 && reinterpret_cast<uintptr_t>(run.weight) % 8 == 0;
}

template <int V>
SAMOE_DEVICE void update(const cpu::AdamW& a, const cpu::AdamWRun& run, int64_t i) {
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

// A block has 4 elements a thread of one run, which it takes together where all pointers allow it.
constexpr int64_t kBlockElements = 4 * kThreads;

__global__ void adamw_kernel(cpu::AdamW a, Runs runs) {
  int r = 0, last = runs.num_runs - 1;  // the last run that starts at or before this block
  while (r < last) {
    const int middle = (r + last + 1) / 2;
    if (runs.first_block[middle] <= static_cast<int64_t>(blockIdx.x)) {
      r = middle;
    } else {
      last = middle - 1;
    }
  }
  const cpu::AdamWRun run = runs.run[r];
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - runs.first_block[r]) * kBlockElements;
  if (is_wide_run(run)) {
    update<4>(a, run, first + static_cast<int64_t>(threadIdx.x) * 4);
  } else {
    for (int k = 0; k < 4; ++k) update<1>(a, run, first + k * kThreads + static_cast<int64_t>(threadIdx.x));
  }
}

}  // namespace

void adamw(const cpu::AdamW& a, cudaStream_t stream) {
  for (int64_t done = 0; done < a.num_runs; done += kRunsOfLaunch) {
    Runs runs = {};
    runs.num_runs = static_cast<int>(a.num_runs - done < kRunsOfLaunch ? a.num_runs - done : kRunsOfLaunch);
    for (int r = 0; r < runs.num_runs; ++r) {
      runs.run[r] = a.runs[done + r];
      runs.first_block[r + 1] = runs.first_block[r] + ceil_div(runs.run[r].num, kBlockElements);
    }
    launch(adamw_kernel, runs.first_block[runs.num_runs], stream, a, runs);
  }
}

}  // namespace cuda
}  // namespace samoe
