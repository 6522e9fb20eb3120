// Inference: linear layers, norms, and the combination of one expert's weights.
#include <cmath>

#include "../../kernels.h"
#include "decode_team.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

int64_t task_outs(int64_t outputs, int num_threads) {
  // Small matrices in smaller tasks, so that threads end together; a multiple of the tile.
  const int64_t fair = outputs / (8 * num_threads) / kTileOuts * kTileOuts;
  return fair < 8 ? 8 : (fair < kTaskOuts ? fair : kTaskOuts);
}

// One task of a linear layer: outputs first .. last - 1 of all tokens.
void linear_task(const DecodeLinear& a, const PackedRows& rows, int64_t first, int64_t last, Following following) {
  const char* x[kRowBlock];
  float* out[kRowBlock];
  for (int64_t t = 0; t < a.num_tokens; t += kRowBlock) {
    const int64_t count = a.num_tokens - t < kRowBlock ? a.num_tokens - t : kRowBlock;
    for (int64_t m = 0; m < count; ++m) {
      x[m] = rows.row(t + m);
      out[m] = a.out_TN + (t + m) * a.outputs;
    }
    multiply(x, count, a.w_NK, 0, a.inputs, first, last, {out, 0, nullptr, a.bias_N, a.accumulate, 1.0f}, following);
  }
}

}  // namespace

void linear_tasks(Member& member, const DecodeLinear& a, const PackedRows& rows) {
  const int64_t step = task_outs(a.outputs, member.size());
  const int64_t num_tasks = (a.outputs + step - 1) / step;
  member.tasks(num_tasks, [&](int64_t task, int64_t after) {
    const int64_t first = task * step, last = first + step < a.outputs ? first + step : a.outputs;
    linear_task(a, rows, first, last, after < num_tasks ? start_of(a.w_NK, after * step, a.inputs) : Following{});
  });
}

void ask_for_linear(const Member& member, const DecodeLinear& a) {
  const int64_t step = task_outs(a.outputs, member.size()), num_tasks = (a.outputs + step - 1) / step;
  const int64_t task = member.next_task(num_tasks);
  if (task < num_tasks) ask_for(start_of(a.w_NK, task * step, a.inputs));
}

void decode_linear(const DecodeLinear& a) {
  static thread_local ThreadMemory memory;
  const PackedRows rows(a.x_TK, a.inputs, a.w_NK.type, memory.bytes(a.num_tokens * packed_bytes(a.w_NK.type, a.inputs)));
  run_team(a.num_threads, [&](Member& member) {
    pack_own(member, rows, a.num_tokens);
    member.wait();
    linear_tasks(member, a, rows);
  });
}

void norm_own(const Member& member, const DecodeNorm& a) {
  member.own(a.num_tokens, [&](int64_t t) {
    normalise(a.x_TH + t * a.hidden, a.weight_H, a.bias_H, a.epsilon, a.rms, a.hidden, a.out_TH + t * a.hidden);
  });
}

void decode_norm(const DecodeNorm& a) {
  run_team(a.num_threads, [&](const Member& member) { norm_own(member, a); });
}

namespace {

// Stores a row, scaled so that its largest magnitude becomes 127. A number that is not finite makes the scale NaN.
void store_i8(const float* row, int64_t num_cols, int8_t* out, float* scale) {
  vf peaks = vf{}, zeros = vf{};
  for (int64_t k = 0; k < num_cols; k += kLanes) {
    const vf x = load_part(row + k, num_cols - k);
    peaks = larger((vf)((vi)x & 0x7fffffff), peaks);
    zeros += x * 0.0f;
  }
  const float peak = max_lanes(peaks);
  *scale = peak / 127.0f + sum_lanes(zeros);
  const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t k = 0; k < num_cols; k += kLanes) {
    vf scaled = load_part(row + k, num_cols - k) * inverse;
    hold(scaled);  // rounded before it is added
    const vb bytes = __builtin_convertvector((vi)(scaled + magic) - (vi)magic, vb);
    if (num_cols - k >= kLanes) {
      memcpy(out + k, &bytes, sizeof bytes);
    } else {
      memcpy(out + k, &bytes, static_cast<size_t>(num_cols - k));
    }
  }
}

// A bank's part of a sum: where its row begins, and its factor.
template <typename W>
struct Part {
  const W* row;
  float factor;
};

constexpr int64_t kMostParts = 16;

// V vectors of a row of the sum, in the order of the banks; one may be a part.
template <int V, typename W>
SAMOE_INLINE void combine_vectors(const Part<W>* parts, int64_t num_parts, int64_t k, int64_t left, bool first, float* sum) {
  vf sums[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sums[v] = first ? vf{} : load_part(sum + k + v * kLanes, left - v * kLanes);
  for (int64_t p = 0; p < num_parts; ++p) {
    const W* row = parts[p].row + k;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vf weight = V == 1 ? load_part(row, left) : load(row + v * kLanes);
      sums[v] = fused(weight, splat(parts[p].factor), sums[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store_part(sum + k + v * kLanes, sums[v], V == 1 ? left : kLanes);
}

// A row of the weighted sum of banks of one type, in floats. A bank with factor 0 is left unread, as in combine_banks.
template <typename W>
void combine_row(const CombineRows& a, int64_t row, float* sum) {
  Part<W> parts[kMostParts];
  int64_t p = 0;
  for (bool first = true; first || p < a.num_banks; first = false) {
    int64_t num_parts = 0;
    for (; p < a.num_banks && num_parts < kMostParts; ++p) {
      const Matrix& bank = a.banks_P[p];
      if (a.coefficients_P[p] == 0.0f) continue;
      const float scale = bank.scale == nullptr ? 1.0f : bank.scale[row];
      parts[num_parts++] = {static_cast<const W*>(bank.data) + row * a.num_cols, a.coefficients_P[p] * scale};
    }
    int64_t k = 0;
    for (; k + 4 * kLanes <= a.num_cols; k += 4 * kLanes) combine_vectors<4>(parts, num_parts, k, 4 * kLanes, first, sum);
    for (; k < a.num_cols; k += kLanes) combine_vectors<1>(parts, num_parts, k, a.num_cols - k, first, sum);
  }
}

void store_row(const CombineRows& a, int64_t row, float* sum) {
  const int64_t offset = row * a.num_cols;
  if (a.out_type == WeightType::i8) {
    store_i8(sum, a.num_cols, static_cast<int8_t*>(a.out) + offset, a.out_scale + row);
  } else if (a.out_type == WeightType::f32) {
    memcpy(static_cast<float*>(a.out) + offset, sum, static_cast<size_t>(a.num_cols) * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(a.out) + offset;
    for (int64_t k = 0; k < a.num_cols; k += kLanes)
      store_part(out + k, load_part(sum + k, a.num_cols - k), a.num_cols - k);
  }
}

}  // namespace

void combine_rows(const CombineRows& a) {
  const ThreadFloats memory(a.num_threads, a.num_cols);
#pragma omp parallel num_threads(a.num_threads)
  {
    float* sum = memory.own();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.num_rows; ++row) {
      switch (a.banks_P[0].type) {
        case WeightType::f32: combine_row<float>(a, row, sum); break;
        case WeightType::bf16: combine_row<uint16_t>(a, row, sum); break;
        case WeightType::i8: combine_row<int8_t>(a, row, sum); break;
      }
      store_row(a, row, sum);
    }
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
