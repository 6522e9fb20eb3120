// Inference: the MLPs of chosen experts. Every expert that some token chose is read once, for all of its tokens.
#include "../../kernels.h"
#include "decode_tile.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

// Slots (t, k) sorted by expert: those of hit expert u are slots[starts[u]] .. slots[starts[u + 1] - 1].
struct Hits {
  explicit Hits(const DecodeExperts& a) {
    const int64_t num_slots = a.num_tokens * a.topk;
    static thread_local ThreadMemory memory;
    counts = static_cast<int64_t*>(memory.bytes((3 * a.num_experts + 1 + num_slots) * static_cast<int64_t>(sizeof(int64_t))));
    experts = counts + a.num_experts;
    starts = experts + a.num_experts;
    slots = starts + a.num_experts + 1;
    memset(counts, 0, static_cast<size_t>(a.num_experts) * sizeof(int64_t));
    for (int64_t s = 0; s < num_slots; ++s)
      if (a.index1_E[a.ids_TK[s]] >= 0) ++counts[a.ids_TK[s]];
    int64_t start = 0;
    for (int64_t e = 0; e < a.num_experts; ++e) {
      if (counts[e] == 0) continue;
      experts[num] = e;
      starts[num++] = start;
      start += counts[e];
      counts[e] = start - counts[e];  // from here on: where the expert's next slot goes
    }
    starts[num] = start;
    for (int64_t s = 0; s < num_slots; ++s)
      if (a.index1_E[a.ids_TK[s]] >= 0) slots[counts[a.ids_TK[s]]++] = s;
  }
  int64_t num = 0;
  int64_t *counts, *experts, *starts, *slots;
};

SAMOE_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
SAMOE_INLINE vf gelu(vf x) { return x / (1.0f + exp(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

void activate(float* h, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i < n; i += kLanes) {
    const int64_t left = n - i;
    const bool whole = left >= kLanes;
    const vf x = whole ? load(h + i) : load_part(h + i, left);
    vf y;
    if (up == nullptr) {
      y = gelu(x);
    } else {
      y = silu(x) * (whole ? load(up + i) : load_part(up + i, left));
    }
    if (whole) {
      store(h + i, y);
    } else {
      store_part(h + i, y, left);
    }
  }
}

// One task of the first product: columns first .. last - 1 of h for all of an expert's rows.
void first_product(const DecodeExperts& a, const Hits& hits, int64_t u, int64_t first, int64_t last, float* up,
                   float* floats) {
  const int64_t expert = hits.experts[u], index = a.index1_E[expert];
  const float factor = a.factor1_E == nullptr ? 1.0f : a.factor1_E[expert];
  const int64_t width = a.gated ? 2 * a.ffn : a.ffn;
  const float* x[kRowBlock];
  float* h[kRowBlock];
  float* ups[kRowBlock];
  for (int64_t begin = hits.starts[u]; begin < hits.starts[u + 1]; begin += kRowBlock) {
    const int64_t left = hits.starts[u + 1] - begin, rows = left < kRowBlock ? left : kRowBlock;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t slot = hits.slots[begin + m];
      x[m] = a.x_TH + slot / a.topk * a.hidden;
      h[m] = a.h_NF + slot * a.ffn;
      ups[m] = up + m * kTaskOuts;
    }
    const float* bias = a.b1 == nullptr ? nullptr : a.b1 + index * width;
    multiply(x, rows, a.w1, index * width, a.hidden, first, last, {h, 0, nullptr, bias, false, factor}, floats);
    if (a.gated) {
      const float* up_bias = bias == nullptr ? nullptr : bias + a.ffn;
      multiply(x, rows, a.w1, index * width + a.ffn, a.hidden, first, last, {ups, first, nullptr, up_bias, false, factor},
               floats);
    }
    for (int64_t m = 0; m < rows; ++m) activate(h[m] + first, a.gated ? ups[m] : nullptr, last - first);
  }
}

void second_product(const DecodeExperts& a, const Hits& hits, int64_t u, int64_t first, int64_t last, float* floats) {
  const int64_t expert = hits.experts[u], index = a.index2_E[expert];
  const float factor = a.factor2_E == nullptr ? 1.0f : a.factor2_E[expert];
  const float* h[kRowBlock];
  float* y[kRowBlock];
  for (int64_t begin = hits.starts[u]; begin < hits.starts[u + 1]; begin += kRowBlock) {
    const int64_t left = hits.starts[u + 1] - begin, rows = left < kRowBlock ? left : kRowBlock;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t slot = hits.slots[begin + m];
      h[m] = a.h_NF + slot * a.ffn;
      y[m] = a.y_NH + slot * a.hidden;
    }
    const float* bias = a.b2 == nullptr ? nullptr : a.b2 + index * a.hidden;
    multiply(h, rows, a.w2, index * a.hidden, a.ffn, first, last, {y, 0, nullptr, bias, false, factor}, floats);
  }
}

void combine_token(const DecodeExperts& a, int64_t t) {
  float* out = a.out_TH + t * a.hidden;
  for (int64_t k = 0; k < a.topk; ++k) {
    const float* y = a.y_NH + (t * a.topk + k) * a.hidden;
    const float prob = a.probs_TK[t * a.topk + k];
    for (int64_t i = 0; i < a.hidden; ++i) out[i] += prob * y[i];
  }
}

}  // namespace

void decode_experts(const DecodeExperts& a) {
  const Hits hits(a);
  const int64_t tasks1 = (a.ffn + kTaskOuts - 1) / kTaskOuts, tasks2 = (a.hidden + kTaskOuts - 1) / kTaskOuts;
  const int64_t longest = a.hidden > a.ffn ? a.hidden : a.ffn;
#pragma omp parallel num_threads(a.num_threads)
  {
    // The widened weights, then the up projections of a gated block.
    float* floats = thread_floats((kTileOuts * longest + 15) / 16 * 16 + kRowBlock * kTaskOuts);
    float* up = floats + (kTileOuts * longest + 15) / 16 * 16;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < hits.num * tasks1; ++task) {
      const int64_t first = task % tasks1 * kTaskOuts;
      first_product(a, hits, task / tasks1, first, first + kTaskOuts < a.ffn ? first + kTaskOuts : a.ffn, up, floats);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < hits.num * tasks2; ++task) {
      const int64_t first = task % tasks2 * kTaskOuts;
      second_product(a, hits, task / tasks2, first, first + kTaskOuts < a.hidden ? first + kTaskOuts : a.hidden,
                     floats);
    }
    if (a.combine) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < a.num_tokens; ++t) combine_token(a, t);
    }
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
