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

// One row of the weighted sum of banks, in floats.
void store_i8(const float* row, int64_t num_cols, int8_t* out, float* scale) {
  float peak = 0.0f;
  for (int64_t k = 0; k < num_cols; ++k) peak = row[k] > peak ? row[k] : (-row[k] > peak ? -row[k] : peak);
  *scale = peak / 127.0f;
  const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
  for (int64_t k = 0; k < num_cols; ++k) out[k] = static_cast<int8_t>(__builtin_rintf(row[k] * inverse));
}

}  // namespace

void combine_rows(const CombineRows& a) {
  const ThreadFloats memory(a.num_threads, a.num_cols);
#pragma omp parallel num_threads(a.num_threads)
  {
    float* sum = memory.own();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.num_rows; ++row) {
      bool first = true;
      for (int64_t p = 0; p < a.num_banks; ++p) {
        if (a.coefficients_P[p] == 0.0f) continue;  // as combine_banks: its bank is left unread
        add_row(a.banks_P[p], row, a.coefficients_P[p], a.num_cols, first, sum);
        first = false;
      }
      if (first) memset(sum, 0, static_cast<size_t>(a.num_cols) * sizeof(float));
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
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
