// The router: one warp a token, lanes over experts; meanings as in kernels/cpu/simd/gate.cpp.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

constexpr int64_t kRunTokens = 8;  // tokens of a group whose scores a warp sums before they join the others'

// Orders logits as floats, NaN above everything and the zeros equal, and equal ones by falling expert id.
SAMOE_DEVICE unsigned long long rank_of(float logit, int64_t expert) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  const uint32_t key = logit != logit ? 0xffffffffu : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
  return static_cast<unsigned long long>(key) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(expert));
}

// Where all logits are low, sigmoid scores are taken in units of exp(peak): so their sum does not vanish.
SAMOE_DEVICE float sigmoid_unit(float peak) { return peak < 0.0f ? peak : 0.0f; }

// A sigmoid score, divided by exp(unit).
SAMOE_DEVICE float sigmoid(float x, float unit) { return 1.0f / (expf(unit) + expf(unit - x)); }

// What a warp found in a run of tokens: how often they chose each expert, their summed distributions, and z.
struct Runs {
  double* z_R;
  float* sums_RE;
  int32_t* counts_RE;
};

// One token: writes its probs, ids and logsumexp, counts its choices, and adds its distribution to sums.
SAMOE_DEVICE float gate_token(const cpu::GateForward& a, int64_t t, int32_t* counts_E, float* sums_E) {
  const int lane = lane_of_thread();
  const float* logits = a.logits_TE + t * a.num_experts;
  const float* keys = a.key_TE != nullptr ? a.key_TE + t * a.num_experts : logits;
  int64_t* ids = a.ids_TK + t * a.topk;
  unsigned long long limit = ~0ull;  // the next choice is the best at or below it
  for (int64_t k = 0; k < a.topk; ++k) {
    unsigned long long best = 0;
    for (int64_t e = lane; e < a.num_experts; e += kWarp) {
      const unsigned long long rank = rank_of(keys[e], e);
      if (rank <= limit && rank > best) best = rank;
    }
    best = warp_max(best);
    limit = best - 1;
    if (lane == 0) {
      const int64_t id = static_cast<uint32_t>(~static_cast<uint32_t>(best));
      ids[k] = id;
      ++counts_E[id];
    }
  }
  __syncwarp();
  float top = logits[ids[0]], chosen_top = top;
  if (a.key_TE != nullptr) {
    for (int64_t e = lane; e < a.num_experts; e += kWarp) top = logits[e] > top ? logits[e] : top;
    top = warp_max(top);
    for (int64_t k = 1; k < a.topk; ++k) chosen_top = logits[ids[k]] > chosen_top ? logits[ids[k]] : chosen_top;
  }
  const auto score = [&](float logit) { return a.sigmoid ? sigmoid(logit, sigmoid_unit(top)) : expf(logit - top); };
  float exponentials = 0.0f, sum = 0.0f;
  for (int64_t e = lane; e < a.num_experts; e += kWarp) {
    exponentials += expf(logits[e] - top);
    sum += score(logits[e]);
  }
  const float logsumexp = top + logf(warp_sum(exponentials));
  const float share = 1.0f / warp_sum(sum);
  for (int64_t e = lane; e < a.num_experts; e += kWarp) sums_E[e] += score(logits[e]) * share;
  // Among chosen logits alone the largest of them is the peak, or all their scores could vanish.
  if (!a.pre_softmax) top = chosen_top;
  float chosen = 0.0f;
  for (int64_t k = lane; k < a.topk; k += kWarp) chosen += score(logits[ids[k]]);
  chosen = warp_sum(chosen);
  const float scale = a.pre_softmax ? (a.sigmoid ? expf(sigmoid_unit(top)) : share) : 1.0f / chosen;
  for (int64_t k = lane; k < a.topk; k += kWarp) a.probs_TK[t * a.topk + k] = score(logits[ids[k]]) * scale;
  if (lane == 0) a.logsumexp_T[t] = logsumexp;
  return logsumexp;
}

__global__ void gate_runs(cpu::GateForward a, int64_t runs_per_group, Runs runs) {
  const int64_t run = global_warp();
  if (run >= runs_per_group * a.num_groups) return;
  const int64_t group = run / runs_per_group, group_tokens = a.num_tokens / a.num_groups;
  const int64_t first = run % runs_per_group * kRunTokens;
  const int64_t last = first + kRunTokens < group_tokens ? first + kRunTokens : group_tokens;
  float* sums = runs.sums_RE + run * a.num_experts;
  int32_t* counts = runs.counts_RE + run * a.num_experts;
  for (int64_t e = lane_of_thread(); e < a.num_experts; e += kWarp) {
    sums[e] = 0.0f;
    counts[e] = 0;
  }
  __syncwarp();
  double z = 0.0;
  for (int64_t t = first; t < last; ++t) {
    const double logsumexp = gate_token(a, group * group_tokens + t, counts, sums);
    z += logsumexp * logsumexp;
  }
  if (lane_of_thread() == 0) runs.z_R[run] = z;
}

// A block joins 32 experts of one group: each warp every eighth run, then the warps in order. The block after these joins z.
__global__ void join_runs(cpu::GateForward a, int64_t runs_per_group, Runs runs) {
  __shared__ float sums[kWarps][kWarp];
  __shared__ int64_t counts[kWarps][kWarp];
  const int64_t tiles = (a.num_experts + kWarp - 1) / kWarp;
  if (blockIdx.x == a.num_groups * tiles) {
    double z = 0.0;
    for (int64_t run = threadIdx.x; run < runs_per_group * a.num_groups; run += kThreads) z += runs.z_R[run];
    z = block_sum(z);
    if (threadIdx.x == 0) *a.z_sum = static_cast<float>(z);
    return;
  }
  const int64_t group = blockIdx.x / tiles, e = blockIdx.x % tiles * kWarp + lane_of_thread();
  float sum = 0.0f;
  int64_t count = 0;
  if (e < a.num_experts) {
    for (int64_t run = warp_of_thread(); run < runs_per_group; run += kWarps) {
      const int64_t place = (group * runs_per_group + run) * a.num_experts + e;
      sum += runs.sums_RE[place];
      count += runs.counts_RE[place];
    }
  }
  sums[warp_of_thread()][lane_of_thread()] = sum;
  counts[warp_of_thread()][lane_of_thread()] = count;
  __syncthreads();
  if (warp_of_thread() != 0 || e >= a.num_experts) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += sums[warp][lane_of_thread()];
    count += counts[warp][lane_of_thread()];
  }
  a.score_sum_GE[group * a.num_experts + e] = sum;
  a.counts_GE[group * a.num_experts + e] = count;
}

int64_t runs_per_group(const cpu::GateForward& a) { return ceil_div(a.num_tokens / a.num_groups, kRunTokens); }

// What the gradient of one token's logits is made of.
struct TokenGradient {
  const float *logits_E, *probs_K, *dprobs_K, *d_E;  // dprobs and d, the group's gradient of score_sum, may be null
  const int64_t* ids_K;
  float dot_chosen;  // <probs, dprobs>
};

SAMOE_DEVICE TokenGradient gradient_of_token(const cpu::GateBackward& a, int64_t t) {
  const int64_t group = t / (a.num_tokens / a.num_groups), slot = t * a.topk;
  TokenGradient g = {a.logits_TE + t * a.num_experts, a.probs_TK + slot, nullptr, nullptr, a.ids_TK + slot, 0.0f};
  if (a.dscore_sum_GE != nullptr) g.d_E = a.dscore_sum_GE + group * a.num_experts;
  if (a.dprobs_TK == nullptr) return g;
  g.dprobs_K = a.dprobs_TK + slot;
  float dot = 0.0f;
  for (int64_t k = lane_of_thread(); k < a.topk; k += kWarp) dot += g.probs_K[k] * g.dprobs_K[k];
  g.dot_chosen = warp_sum(dot);
  return g;
}

// The place of the k-th choice's gradient.
SAMOE_DEVICE float& chosen(const cpu::GateBackward& a, const TokenGradient& g, int64_t k, float* out) {
  assert(g.ids_K[k] >= 0 && g.ids_K[k] < a.num_experts);
  return out[g.ids_K[k]];
}

// Softmax: dl = p (d - <p, d>) + 2 dz lse p, with d the gradient of the distribution. Chosen probabilities are p
// itself, and their gradient part of d, or q, a softmax over the chosen logits alone: dl = q (dq - <q, dq>).
SAMOE_DEVICE void backward_softmax(const cpu::GateBackward& a, const TokenGradient& g, float logsumexp, float dz, float* out) {
  const int lane = lane_of_thread();
  float dot = 0.0f;
  if (g.d_E != nullptr) {
    for (int64_t e = lane; e < a.num_experts; e += kWarp) dot += expf(g.logits_E[e] - logsumexp) * g.d_E[e];
  }
  const float shift = dz - warp_sum(dot) - (a.pre_softmax ? g.dot_chosen : 0.0f);
  for (int64_t e = lane; e < a.num_experts; e += kWarp) {
    const float d = g.d_E == nullptr ? shift : g.d_E[e] + shift;
    out[e] = expf(g.logits_E[e] - logsumexp) * d;
  }
  if (g.dprobs_K == nullptr) return;
  __syncwarp();
  for (int64_t k = lane; k < a.topk; k += kWarp) {
    chosen(a, g, k, out) += g.probs_K[k] * (g.dprobs_K[k] - (a.pre_softmax ? 0.0f : g.dot_chosen));
  }
}

// Sigmoid: with g the gradient of the scores' logarithms, dl = g (1 - s); z as for softmax. The distribution n = s / sum(s)
// brings g = n (d - <n, d>), scores normalised over the chosen ones g = q (dq - <q, dq>), a score as it is g = s ds.
SAMOE_DEVICE void backward_sigmoid(const cpu::GateBackward& a, const TokenGradient& g, float logsumexp, float dz, float* out) {
  const int lane = lane_of_thread();
  const float unit = sigmoid_unit(logsumexp);
  float sum = 0.0f, dot = 0.0f;
  for (int64_t e = lane; e < a.num_experts; e += kWarp) {
    const float score = sigmoid(g.logits_E[e], unit);
    sum += score;
    if (g.d_E != nullptr) dot += score * g.d_E[e];
  }
  const float share = 1.0f / warp_sum(sum);
  dot = warp_sum(dot) * share;
  for (int64_t e = lane; e < a.num_experts; e += kWarp) {
    const float logit = g.logits_E[e];
    const float of_log = g.d_E == nullptr ? 0.0f : (g.d_E[e] - dot) * share * sigmoid(logit, unit);
    float gradient = of_log * (1.0f - sigmoid(logit, 0.0f));
    if (a.dz != nullptr) gradient += dz * expf(logit - logsumexp);
    out[e] = gradient;
  }
  if (g.dprobs_K == nullptr) return;
  __syncwarp();
  for (int64_t k = lane; k < a.topk; k += kWarp) {
    float& gradient = chosen(a, g, k, out);
    const float score = sigmoid(g.logits_E[g.ids_K[k]], 0.0f);
    const float of_log = a.pre_softmax ? score * g.dprobs_K[k] : g.probs_K[k] * (g.dprobs_K[k] - g.dot_chosen);
    gradient += of_log * (1.0f - score);
  }
}

__global__ void gate_backward_tokens(cpu::GateBackward a) {
  const int64_t t = global_warp();
  if (t >= a.num_tokens) return;
  const TokenGradient g = gradient_of_token(a, t);
  const float logsumexp = a.logsumexp_T[t];
  const float dz = a.dz == nullptr ? 0.0f : 2.0f * *a.dz * logsumexp;
  float* out = a.dlogits_TE + t * a.num_experts;
  if (a.sigmoid) {
    backward_sigmoid(a, g, logsumexp, dz, out);
  } else {
    backward_softmax(a, g, logsumexp, dz, out);
  }
}

}  // namespace

int64_t gate_workspace_bytes(const cpu::GateForward& a) {
  return a.num_groups * runs_per_group(a) * (8 + 8 * a.num_experts);
}

void gate_forward(const cpu::GateForward& a, void* workspace, cudaStream_t stream) {
  const int64_t of_group = runs_per_group(a), num_runs = a.num_groups * of_group;
  double* z_R = static_cast<double*>(workspace);
  float* sums_RE = reinterpret_cast<float*>(z_R + num_runs);
  const Runs runs = {z_R, sums_RE, reinterpret_cast<int32_t*>(sums_RE + num_runs * a.num_experts)};
  launch(gate_runs, ceil_div(num_runs, kWarps), stream, a, of_group, runs);
  launch(join_runs, a.num_groups * ceil_div(a.num_experts, kWarp) + 1, stream, a, of_group, runs);
}

void gate_backward(const cpu::GateBackward& a, cudaStream_t stream) {
  launch(gate_backward_tokens, ceil_div(a.num_tokens, kWarps), stream, a);
}

}  // namespace cuda
}  // namespace samoe
