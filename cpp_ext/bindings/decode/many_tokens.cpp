#include "many_tokens.h"

#include <cstring>
#include <vector>

#include "../experts/products.h"

namespace samoe {
namespace decode {
namespace {

constexpr int64_t kWideElements = int64_t{1} << 19;  // 2 MB in fp32: a thread's widened weights at a time

samoe::Matrix floats_of(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  return {const_cast<float*>(data), DType::f32, rows, columns, stride};
}

// Rows of a matrix in fp32.
samoe::Matrix wide(const cpu::Matrix& w, int64_t first, int64_t rows, int64_t inputs, WorkMemory& memory) {
  const float* data = static_cast<const float*>(w.data) + first * inputs;
  if (w.type == WeightType::f32) return floats_of(data, rows, inputs, inputs);
  const samoe::Matrix result = memory.matrix(DType::f32, rows, inputs);
  const int64_t size = w.type == WeightType::bf16 ? 2 : 1;
  const cpu::Matrix part = {w.type, static_cast<const char*>(w.data) + first * inputs * size,
                            w.scale == nullptr ? nullptr : w.scale + first};
  const float one = 1.0f;
  cpu::kernels().combine_rows({&part, &one, 1, rows, inputs, WeightType::f32, result.data, nullptr, 1});
  return result;
}

// Tasks are ranges of outputs, which have a thread each and read all tokens.
void linear_products(const cpu::DecodeLinear& a) {
  const int64_t fair = std::max<int64_t>(64, (a.outputs + a.num_threads - 1) / a.num_threads);
  const int64_t most = a.w_NK.type == WeightType::f32 ? fair : std::max<int64_t>(64, kWideElements / a.inputs);
  const int64_t step = std::min(fair, most), num_tasks = (a.outputs + step - 1) / step;
  run_tasks(static_cast<size_t>(num_tasks), a.num_threads, [&](size_t task, WorkMemory& memory, const auto&) {
    const int64_t first = static_cast<int64_t>(task) * step, outputs = std::min(step, a.outputs - first);
    const samoe::Matrix x = floats_of(a.x_TK, a.num_tokens, a.inputs, a.inputs);
    const samoe::Matrix out = floats_of(a.out_TN + first, a.num_tokens, outputs, a.outputs);
    const samoe::Matrix w = wide(a.w_NK, first, outputs, a.inputs, memory);
    for (int64_t t = 0; a.bias_N != nullptr && t < a.num_tokens; ++t) {
      float* row = static_cast<float*>(out.at(t, 0));
      for (int64_t n = 0; n < outputs; ++n) row[n] = a.bias_N[first + n] + (a.accumulate ? row[n] : 0.0f);
    }
    if (a.accumulate || a.bias_N != nullptr) return add_times_transposed(x, w, out);
    times(x, w, true, out, memory);
  });
}

// The matrix of an expert within a stack of [rows, inputs], times its tokens.
void expert_linear(const cpu::Matrix& stack, int64_t index, int64_t rows, int64_t inputs, const float* bias, float factor,
                   const float* x, int64_t count, float* out, int num_threads) {
  const int64_t size = stack.type == WeightType::f32 ? 4 : (stack.type == WeightType::bf16 ? 2 : 1);
  const cpu::Matrix w = {stack.type, static_cast<const char*>(stack.data) + index * rows * inputs * size,
                         stack.scale == nullptr ? nullptr : stack.scale + index * rows};
  linear_products({x, w, bias == nullptr ? nullptr : bias + index * rows, count, inputs, rows, false, out, num_threads});
  for (int64_t i = 0; factor != 1.0f && i < count * rows; ++i) out[i] *= factor;
}

// One expert after the other, each with all threads.
void expert_products(const cpu::DecodeExperts& a) {
  const int64_t num_slots = a.num_tokens * a.topk, up = a.gated ? 2 * a.ffn : a.ffn;
  std::vector<std::vector<int64_t>> slots_E(static_cast<size_t>(a.num_experts));
  for (int64_t s = 0; s < num_slots; ++s)
    if (a.ids_TK[s] >= 0 && a.index1_E[a.ids_TK[s]] >= 0) slots_E[static_cast<size_t>(a.ids_TK[s])].push_back(s);
  LentMemory memory;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    const std::vector<int64_t>& slots = slots_E[static_cast<size_t>(e)];
    const int64_t count = static_cast<int64_t>(slots.size());
    if (count == 0) continue;
    memory->reset();
    const auto floats = [&](int64_t width) { return static_cast<float*>(memory->matrix(DType::f32, count, width).data); };
    float *x = floats(a.hidden), *h = floats(up), *hidden = floats(a.ffn), *y = x;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(x + i * a.hidden, a.x_TH + slots[static_cast<size_t>(i)] / a.topk * a.hidden, sizeof(float) * static_cast<size_t>(a.hidden));
    expert_linear(a.w1, a.index1_E[e], up, a.hidden, a.b1, a.factor1_E == nullptr ? 1.0f : a.factor1_E[e], x, count, h,
                  a.num_threads);
    const int64_t part = (count + a.num_threads - 1) / a.num_threads;
    run_tasks(static_cast<size_t>(a.num_threads), a.num_threads, [&](size_t task, WorkMemory&, const auto&) {
      const int64_t first = std::min(count, static_cast<int64_t>(task) * part), rows = std::min(part, count - first);
      cpu::kernels().activate({DType::f32, DType::f32, h + first * up, nullptr, rows, a.ffn, a.gated, nullptr, hidden + first * a.ffn});
    });
    expert_linear(a.w2, a.index2_E[e], a.hidden, a.ffn, a.b2, a.factor2_E == nullptr ? 1.0f : a.factor2_E[e], hidden,
                  count, y, a.num_threads);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(a.y_NH + slots[static_cast<size_t>(i)] * a.hidden, y + i * a.hidden, sizeof(float) * static_cast<size_t>(a.hidden));
  }
  for (int64_t t = 0; a.combine && t < a.num_tokens; ++t) {
    for (int64_t s = t * a.topk; s < (t + 1) * a.topk; ++s) {
      if (a.ids_TK[s] < 0) continue;
      for (int64_t i = 0; i < a.hidden; ++i) a.out_TH[t * a.hidden + i] += a.probs_TK[s] * a.y_NH[s * a.hidden + i];
    }
  }
}

}  // namespace

bool takes_products(WeightType type, int64_t num_tokens) {
  const ProductChoice choice = product_choice();
  // int8 by digits of bytes is ahead of products in fp32 wherever either was measured.
  return type != WeightType::i8 && num_tokens >= (type == WeightType::f32 ? choice.fp32_tokens : choice.bf16_tokens);
}

void run_linear(const cpu::DecodeLinear& a) {
  if (takes_products(a.w_NK.type, a.num_tokens)) return linear_products(a);
  cpu::kernels().decode_linear(a);
}

void run_experts(const cpu::DecodeExperts& a) {
  // Tokens of an expert that has its fair part of them.
  if (takes_products(a.w1.type, a.num_tokens * a.topk / a.num_experts)) return expert_products(a);
  cpu::kernels().decode_experts(a);
}

}  // namespace decode
}  // namespace samoe
