// The router: scores, top-k, counts and the sums of the balancing losses, forward and backward.
#include <cmath>

#include "../../kernels.h"
#include "gate_row.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kBlockTokens = 64;  // sums are formed per block and added in block order: no dependence on threads

// Shares of the chosen experts alone, where others may be so much better that the row's scores of all chosen vanish.
void shares_of_chosen(const GateForward& a, const float* row, const int64_t* ids, float* probs) {
  float peak = row[ids[0]], sum = 0.0f;
  for (int64_t k = 1; k < a.topk; ++k) peak = row[ids[k]] > peak ? row[ids[k]] : peak;
  const float unit = sigmoid_unit(peak);
  for (int64_t k = 0; k < a.topk; ++k) {
    probs[k] = a.sigmoid ? 1.0f / (std::exp(unit) + std::exp(unit - row[ids[k]])) : std::exp(row[ids[k]] - peak);
    sum += probs[k];
  }
  for (int64_t k = 0; k < a.topk; ++k) probs[k] /= sum;
}

// Probabilities of the chosen experts; scale turns a score into a probability that is not normalised over the chosen.
void chosen_probs(const GateForward& a, const float* scores, float scale, const int64_t* ids, float* probs) {
  float sum = 0.0f;
  for (int64_t k = 0; k < a.topk; ++k) {
    probs[k] = scores[ids[k]];
    sum += probs[k];
  }
  if (!a.pre_softmax) scale = 1.0f / sum;  // the best chosen expert is the row's best: the sum cannot vanish
  for (int64_t k = 0; k < a.topk; ++k) probs[k] *= scale;
}

// Takes the best experts by a row of keys, padded to whole vectors.
void take_topk(const float* chosen_by, int64_t num_experts, int64_t topk, Scratch& s, int64_t* ids) {
  int32_t* keys = reinterpret_cast<int32_t*>(s.row(2));
  make_keys(chosen_by, num_experts, s.width, keys);
  for (int64_t k = 0; k < topk; ++k) ids[k] = take_best(keys, s.width);
}

// One token: writes its probs and ids; returns logsumexp, and what turns the scores in row 1 into its distribution.
float choose(const GateForward& a, int64_t t, Scratch& s, float* scale_out) {
  float* row = s.row(0);
  float* scores = s.row(1);
  copy_logits(a.logits_TE + t * a.num_experts, a.num_experts, row, s.width);
  const float* chosen_by = row;
  if (a.key_TE != nullptr) {
    copy_logits(a.key_TE + t * a.num_experts, a.num_experts, s.row(3), s.width);
    chosen_by = s.row(3);
  }
  int64_t* ids = a.ids_TK + t * a.topk;
  take_topk(chosen_by, a.num_experts, a.topk, s, ids);
  float peak, sum = exponentials(row, s.width, scores, &peak);
  const float logsumexp = peak + std::log(sum);
  if (a.sigmoid) sum = sigmoids(row, s.width, sigmoid_unit(peak), scores);
  *scale_out = 1.0f / sum;
  if (a.key_TE != nullptr && !a.pre_softmax) {
    shares_of_chosen(a, row, ids, a.probs_TK + t * a.topk);
  } else {
    const float score = a.sigmoid ? std::exp(sigmoid_unit(peak)) : *scale_out;
    chosen_probs(a, scores, score, ids, a.probs_TK + t * a.topk);
  }
  return logsumexp;
}

// The same, and adds the token's distribution to sums.
float gate_token(const GateForward& a, int64_t t, Scratch& s, float* sums) {
  float scale;
  const float logsumexp = choose(a, t, s, &scale);
  const float* scores = s.row(1);
  for (int64_t e = 0; e < s.width; e += kLanes) store(sums + e, load(sums + e) + load(scores + e) * scale);
  a.logsumexp_T[t] = logsumexp;
  return logsumexp;
}

}  // namespace

void gate_forward(const GateForward& a) {
  const int64_t width = padded(a.num_experts);
  const int64_t group_tokens = a.num_tokens / a.num_groups;
  const int64_t blocks_per_group = (group_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t num_blocks = a.num_groups * blocks_per_group;
  float* block_sums = aligned_floats(num_blocks * width);
  double* block_z = static_cast<double*>(std::malloc(static_cast<size_t>(num_blocks + 1) * sizeof(double)));
#pragma omp parallel num_threads(a.num_threads)
  {
    Scratch scratch(a.num_experts);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t group = block / blocks_per_group;
      const int64_t first = block % blocks_per_group * kBlockTokens;
      const int64_t last = first + kBlockTokens < group_tokens ? first + kBlockTokens : group_tokens;
      float* sums = block_sums + block * width;
      memset(sums, 0, static_cast<size_t>(width) * sizeof(float));
      double z = 0.0;
      for (int64_t t = first; t < last; ++t) {
        const double logsumexp = gate_token(a, group * group_tokens + t, scratch, sums);
        z += logsumexp * logsumexp;
      }
      block_z[block] = z;
    }
  }
  double z = 0.0;
  for (int64_t group = 0; group < a.num_groups; ++group) {
    float* sums = a.score_sum_GE + group * a.num_experts;
    for (int64_t e = 0; e < a.num_experts; ++e) sums[e] = 0.0f;
    for (int64_t b = group * blocks_per_group; b < (group + 1) * blocks_per_group; ++b) {
      for (int64_t e = 0; e < a.num_experts; ++e) sums[e] += block_sums[b * width + e];
      z += block_z[b];
    }
    int64_t* counts = a.counts_GE + group * a.num_experts;
    for (int64_t e = 0; e < a.num_experts; ++e) counts[e] = 0;
    const int64_t* ids = a.ids_TK + group * group_tokens * a.topk;
    for (int64_t i = 0; i < group_tokens * a.topk; ++i) ++counts[ids[i]];
  }
  *a.z_sum = static_cast<float>(z);
  std::free(block_sums);
  std::free(block_z);
}

namespace {

// How many of the values come before the i-th by size, the earlier first among equals.
int64_t rank_of(const float* values, int64_t count, int64_t i) {
  int64_t rank = 0;
  for (int64_t j = 0; j < count; ++j) rank += values[j] > values[i] || (values[j] == values[i] && j < i);
  return rank;
}

// Keys of -inf outside the groups that the token may use. sums: room for a number per group.
void close_groups(const DecodeChoice& a, float* key, float* sums) {
  const int64_t size = a.num_experts / a.num_groups, best = a.topk / a.group_topk;
  for (int64_t g = 0; g < a.num_groups; ++g) {
    const float* group = key + g * size;
    sums[g] = 0.0f;
    for (int64_t i = 0; i < size; ++i)
      if (rank_of(group, size, i) < best) sums[g] += group[i];
  }
  for (int64_t e = 0; e < a.num_experts; ++e)
    if (rank_of(sums, a.num_groups, e / size) >= a.group_topk) key[e] = -__builtin_inff();
}

// What experts are chosen by, where that is not the logit; else null.
const float* choice_key(const DecodeChoice& a, const float* logits, Scratch& s) {
  if (a.bias_E == nullptr && a.num_groups == 0) return nullptr;
  float *row = s.row(0), *key = s.row(4), peak;
  copy_logits(logits, a.num_experts, row, s.width);
  if (a.norm_scale == nullptr && a.sigmoid) {
    sigmoids(row, s.width, 0.0f, key);
  } else if (a.norm_scale == nullptr && (a.pre_softmax || a.bias_E != nullptr)) {
    const float sum = exponentials(row, s.width, key, &peak);
    for (int64_t e = 0; e < a.num_experts; ++e) key[e] /= sum;
  } else {
    copy_logits(logits, a.num_experts, key, s.width);
  }
  if (a.bias_E != nullptr)
    for (int64_t e = 0; e < a.num_experts; ++e) key[e] += a.bias_E[e];
  if (a.candidates_E != nullptr)
    for (int64_t e = 0; e < a.num_experts; ++e)
      if (a.candidates_E[e] == 0.0f) key[e] = -__builtin_inff();
  if (a.num_groups != 0) close_groups(a, key, s.row(1));
  // A bias gives no place to an expert without a score: it would count as idle, and its bias rise for ever.
  if (a.norm_scale != nullptr)
    for (int64_t e = 0; e < a.num_experts; ++e) key[e] = logits[e] > 0.0f ? key[e] : -__builtin_inff();
  return key;
}

// Norm scores: ReLU of logits of a learned length. No expert without a score is chosen.
void choose_by_norm(const DecodeChoice& a, float* logits, Scratch& s, int64_t* ids, float* probs) {
  float squares = 0.0f;
  for (int64_t e = 0; e < a.num_experts; ++e) squares += logits[e] * logits[e];
  const float length = std::sqrt(squares), scale = *a.norm_scale / (length > 1e-12f ? length : 1e-12f);
  for (int64_t e = 0; e < a.num_experts; ++e) logits[e] *= a.candidates_E != nullptr ? scale * a.candidates_E[e] : scale;
  const float* key = choice_key(a, logits, s);
  copy_logits(key != nullptr ? key : logits, a.num_experts, s.row(3), s.width);
  take_topk(s.row(3), a.num_experts, a.topk, s, ids);
  for (int64_t k = 0; k < a.topk; ++k) {
    const bool has_none = logits[ids[k]] <= 0.0f;
    probs[k] = has_none ? 0.0f : logits[ids[k]];
    if (has_none) ids[k] = -1;
  }
}

}  // namespace

int64_t choice_floats(int64_t num_experts) { return Scratch::kRows * padded(num_experts); }

void choose_experts(const DecodeChoice& a, int64_t token, float* work) {
  Scratch scratch(a.num_experts, work);
  float* logits = a.logits_TE + token * a.num_experts;
  int64_t* ids = a.ids_TK + token * a.topk;
  float* probs = a.probs_TK + token * a.topk;
  if (a.norm_scale != nullptr) {
    choose_by_norm(a, logits, scratch, ids, probs);
  } else {
    if (a.candidates_E != nullptr)
      for (int64_t e = 0; e < a.num_experts; ++e) logits[e] += std::log(a.candidates_E[e]);
    GateForward gate = {};
    gate.logits_TE = logits;
    gate.key_TE = choice_key(a, logits, scratch);
    gate.num_experts = a.num_experts;
    gate.topk = a.topk;
    gate.sigmoid = a.sigmoid;
    gate.pre_softmax = a.pre_softmax;
    gate.probs_TK = probs;
    gate.ids_TK = ids;
    float scale;
    choose(gate, 0, scratch, &scale);
  }
  float factor = a.factor;
  if (a.mixing_T2 != nullptr) {
    const float* mixing = a.mixing_T2 + 2 * token;
    const float routed = 1.0f / (1.0f + std::exp(mixing[1] - mixing[0]));
    a.shared_T[token] = 1.0f / (1.0f + std::exp(mixing[0] - mixing[1]));
    factor *= routed;
  }
  for (int64_t k = 0; k < a.topk; ++k) probs[k] *= factor;
}

void decode_choose(const DecodeChoice& a) {
#pragma omp parallel num_threads(a.num_threads)
  {
    Scratch memory(a.num_experts);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.num_tokens; ++t) choose_experts(a, t, memory.base);
  }
}

namespace {

// Adds the gradient through the chosen probabilities, where they were normalised among themselves: q (dq - <q, dq>), of
// the logits in a softmax, and of the scores' logarithms otherwise.
void add_normalised(const GateBackward& a, int64_t t, float* gradient) {
  const float* q = a.probs_TK + t * a.topk;
  const float* dq = a.dprobs_TK + t * a.topk;
  const int64_t* ids = a.ids_TK + t * a.topk;
  float dot = 0.0f;
  for (int64_t k = 0; k < a.topk; ++k) dot += q[k] * dq[k];
  for (int64_t k = 0; k < a.topk; ++k) gradient[ids[k]] += q[k] * (dq[k] - dot);
}

// Softmax: dl = p (d - <p, d>) + 2 dz lse p, with d the gradient of the distribution, chosen experts' included.
void backward_softmax(const GateBackward& a, int64_t t, const float* d_group, Scratch& s) {
  float* row = s.row(0);
  float* p = s.row(1);
  const float logsumexp = a.logsumexp_T[t];
  const bool add_chosen = a.dprobs_TK != nullptr && a.pre_softmax;
  const int64_t* ids = a.ids_TK + t * a.topk;
  for (int64_t e = 0; e < s.width; e += kLanes) store(p + e, exp(load(row + e) - logsumexp));
  float dot = 0.0f;
  if (d_group != nullptr) {
    vf sum = vf{};
    for (int64_t e = 0; e < s.width; e += kLanes) sum += load(p + e) * load(d_group + e);
    dot = sum_lanes(sum);
  }
  if (add_chosen)
    for (int64_t k = 0; k < a.topk; ++k) dot += p[ids[k]] * a.dprobs_TK[t * a.topk + k];
  const float shift = (a.dz != nullptr ? 2.0f * *a.dz * logsumexp : 0.0f) - dot;
  for (int64_t e = 0; e < s.width; e += kLanes) {
    const vf d = d_group != nullptr ? load(d_group + e) + shift : splat(shift);
    store(row + e, load(p + e) * d);
  }
  if (add_chosen)
    for (int64_t k = 0; k < a.topk; ++k) row[ids[k]] += p[ids[k]] * a.dprobs_TK[t * a.topk + k];
  if (a.dprobs_TK != nullptr && !a.pre_softmax) add_normalised(a, t, row);
}

// Sigmoid: with g the gradient of the scores' logarithms, dl = g (1 - s); z as for softmax. The distribution n = s / sum(s)
// brings g = n (d - <n, d>), a score as it is g = s ds.
void backward_sigmoid(const GateBackward& a, int64_t t, const float* d_group, Scratch& s) {
  float* row = s.row(0);
  float* scores = s.row(1);
  float* gradient = s.row(2);
  const float logsumexp = a.logsumexp_T[t], unit = sigmoid_unit(logsumexp), one = std::exp(unit);
  const float scale = 1.0f / sigmoids(row, s.width, unit, scores);
  vf sum = vf{};
  if (d_group != nullptr)
    for (int64_t e = 0; e < s.width; e += kLanes) sum += load(scores + e) * load(d_group + e);
  const float dot = sum_lanes(sum) * scale;
  for (int64_t e = 0; e < s.width; e += kLanes) {
    store(gradient + e, d_group != nullptr ? load(scores + e) * scale * (load(d_group + e) - dot) : vf{});
  }
  if (a.dprobs_TK != nullptr) {
    const int64_t* ids = a.ids_TK + t * a.topk;
    if (a.pre_softmax) {
      for (int64_t k = 0; k < a.topk; ++k) gradient[ids[k]] += scores[ids[k]] * one * a.dprobs_TK[t * a.topk + k];
    } else {
      add_normalised(a, t, gradient);
    }
  }
  const float dz = a.dz != nullptr ? 2.0f * *a.dz * logsumexp : 0.0f;
  for (int64_t e = 0; e < s.width; e += kLanes) {
    vf dlogits = load(gradient + e) * (1.0f - load(scores + e) * one);
    if (a.dz != nullptr) dlogits += dz * exp(load(row + e) - logsumexp);
    store(row + e, dlogits);
  }
}

}  // namespace

void gate_backward(const GateBackward& a) {
  const int64_t width = padded(a.num_experts);
  const int64_t group_tokens = a.num_tokens / a.num_groups;
  float* d_groups = nullptr;  // [G, width], padded with zeros
  if (a.dscore_sum_GE != nullptr) {
    d_groups = aligned_floats(a.num_groups * width);
    memset(d_groups, 0, static_cast<size_t>(a.num_groups * width) * sizeof(float));
    for (int64_t g = 0; g < a.num_groups; ++g)
      memcpy(d_groups + g * width, a.dscore_sum_GE + g * a.num_experts, static_cast<size_t>(a.num_experts) * 4);
  }
#pragma omp parallel num_threads(a.num_threads)
  {
    Scratch scratch(a.num_experts);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      copy_logits(a.logits_TE + t * a.num_experts, a.num_experts, scratch.row(0), width);
      const float* d_group = d_groups == nullptr ? nullptr : d_groups + t / group_tokens * width;
      if (a.sigmoid) {
        backward_sigmoid(a, t, d_group, scratch);
      } else {
        backward_softmax(a, t, d_group, scratch);
      }
      memcpy(a.dlogits_TE + t * a.num_experts, scratch.row(0), static_cast<size_t>(a.num_experts) * sizeof(float));
    }
  }
  std::free(d_groups);
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
