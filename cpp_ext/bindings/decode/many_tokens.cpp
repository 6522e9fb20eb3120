#include "many_tokens.h"

#include <vector>

#include "../../kernels/cpu/expert_plan.h"
#include "../experts/products.h"

namespace samoe {
namespace decode {
namespace {

constexpr int64_t kWideElements = int64_t{1} << 19;  // 2 MB in fp32: a thread's widened weights at a time
constexpr int64_t kTokenBlock = 256;                 // with 2,048 inputs 1 MB in bf16: a core's second-level cache

samoe::Matrix floats_of(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  return {const_cast<float*>(data), DType::f32, rows, columns, stride};
}

int64_t size_of(WeightType type) { return type == WeightType::f32 ? 4 : (type == WeightType::bf16 ? 2 : 1); }

// Rows of weights from `first` on.
cpu::Matrix rows_from(const cpu::Matrix& w, int64_t first, int64_t inputs) {
  return {w.type, static_cast<const char*>(w.data) + first * inputs * size_of(w.type),
          w.scale == nullptr ? nullptr : w.scale + first};
}

// Whether activations are rounded for products with weights of a type, as in training.
bool rounds(WeightType type) { return type == WeightType::bf16 && product_choice().bf16 != Bf16Products::fp32; }
DType input_type(WeightType type) { return rounds(type) ? DType::bf16 : DType::f32; }

// out += x w^T, or out = x w^T, plus bias. Weights of a type that x has not are widened a part at a time.
void multiply(const samoe::Matrix& x, const cpu::Matrix& w, const float* bias, bool accumulate, const samoe::Matrix& out,
              WorkMemory& memory) {
  for (int64_t t = 0; (bias != nullptr || !accumulate) && t < out.rows; ++t) {
    float* row = static_cast<float*>(out.at(t, 0));
    for (int64_t n = 0; n < out.columns; ++n) row[n] = (bias == nullptr ? 0.0f : bias[n]) + (accumulate ? row[n] : 0.0f);
  }
  const int64_t inputs = x.columns;
  if (w.type == WeightType::f32 || x.dtype == DType::bf16) {
    const samoe::Matrix as_it_lies = {const_cast<void*>(w.data), x.dtype, out.columns, inputs, inputs};
    return add_times_transposed(x, as_it_lies, out, memory);
  }
  const int64_t step = std::min(out.columns, std::max<int64_t>(64, kWideElements / std::max<int64_t>(1, inputs)));
  const samoe::Matrix wide = memory.matrix(DType::f32, step, inputs);
  for (int64_t begin = 0; begin < out.columns; begin += step) {
    const int64_t end = std::min(out.columns, begin + step);
    const cpu::Matrix part = rows_from(w, begin, inputs);
    const float one = 1.0f;
    cpu::kernels().combine_rows({&part, &one, 1, end - begin, inputs, WeightType::f32, wide.data, nullptr, 1});
    add_times_transposed(x, wide.row_range(0, end - begin), out.column_range(begin, end), memory);
  }
}

// Runs run(begin, end) for ranges of tokens, one for each thread.
template <typename Run>
void share_tokens(int64_t num_tokens, int num_threads, Run run) {
  const int64_t part = (num_tokens + num_threads - 1) / num_threads;
  run_tasks(static_cast<size_t>(num_threads), num_threads, [&](size_t task, WorkMemory&, const auto&) {
    const int64_t begin = std::min(num_tokens, static_cast<int64_t>(task) * part);
    run(begin, std::min(num_tokens, begin + part));
  });
}

// Tasks are ranges of outputs, and in bf16 of tokens: its products go by panels of 48 outputs, so that many tasks of few
// panels end together.
void linear_products(const cpu::DecodeLinear& a) {
  LentMemory shared;
  samoe::Matrix x = floats_of(a.x_TK, a.num_tokens, a.inputs, a.inputs);
  int64_t step = std::max<int64_t>(64, (a.outputs + a.num_threads - 1) / a.num_threads);
  int64_t block = std::max<int64_t>(1, a.num_tokens);
  if (rounds(a.w_NK.type)) {
    const samoe::Matrix rounded = shared->matrix(DType::bf16, x.rows, x.columns);
    share_tokens(x.rows, a.num_threads, [&](int64_t begin, int64_t end) {
      cpu::kernels().convert({x.dtype, rounded.dtype, x.at(begin, 0), rounded.at(begin, 0), (end - begin) * x.columns, false});
    });
    x = rounded;
    step = 48 * std::clamp<int64_t>(a.outputs / (4 * 48 * a.num_threads), 1, 4);
    block = kTokenBlock;
  }
  const int64_t num_steps = (a.outputs + step - 1) / step, num_blocks = (a.num_tokens + block - 1) / block;
  run_tasks(static_cast<size_t>(num_steps * num_blocks), a.num_threads, [&](size_t task, WorkMemory& memory, const auto&) {
    const int64_t first = static_cast<int64_t>(task) % num_steps * step, outputs = std::min(step, a.outputs - first);
    const int64_t begin = static_cast<int64_t>(task) / num_steps * block, end = std::min(a.num_tokens, begin + block);
    multiply(x.row_range(begin, end), rows_from(a.w_NK, first, a.inputs), a.bias_N == nullptr ? nullptr : a.bias_N + first,
             a.accumulate, floats_of(a.out_TN + begin * a.outputs + first, end - begin, outputs, a.outputs), memory);
  });
}

// Rows of tokens, each with its expert's results.
struct SlotsByExpert {
  std::vector<int64_t> slots, rows_E;

  explicit SlotsByExpert(const cpu::DecodeExperts& a) : rows_E(static_cast<size_t>(a.num_experts)) {
    std::vector<std::vector<int64_t>> slots_E(rows_E.size());
    for (int64_t s = 0; s < a.num_tokens * a.topk; ++s)
      if (a.ids_TK[s] >= 0 && a.index1_E[a.ids_TK[s]] >= 0) slots_E[static_cast<size_t>(a.ids_TK[s])].push_back(s);
    for (size_t e = 0; e < rows_E.size(); ++e) {
      rows_E[e] = static_cast<int64_t>(slots_E[e].size());
      slots.insert(slots.end(), slots_E[e].begin(), slots_E[e].end());
    }
  }
};

// Experts are divided among threads as in training.
void expert_products(const cpu::DecodeExperts& a) {
  const int64_t up = a.gated ? 2 * a.ffn : a.ffn;
  const SlotsByExpert by(a);
  const cpu::ExpertPlan plan = cpu::plan_experts(by.rows_E.data(), a.num_experts, up, a.ffn, a.num_threads, false);
  run_tasks(plan.tasks.size(), a.num_threads, [&](size_t i, WorkMemory& memory, const auto&) {
    const cpu::ExpertTask& task = plan.tasks[i];
    const int64_t e = task.expert, n = task.end - task.begin, *slots = by.slots.data() + task.begin;
    const auto product = [&](const samoe::Matrix& x, const cpu::Matrix& stack, int64_t index, int64_t rows, const float* bias,
                             const float* factor_E) {
      const samoe::Matrix out = memory.matrix(DType::f32, n, rows);
      multiply(x, rows_from(stack, index * rows, x.columns), bias == nullptr ? nullptr : bias + index * rows, false, out, memory);
      float* data = static_cast<float*>(out.data);
      for (int64_t j = 0; factor_E != nullptr && j < n * rows; ++j) data[j] *= factor_E[e];
      return out;
    };
    const samoe::Matrix x = memory.matrix(input_type(a.w1.type), n, a.hidden);
    for (int64_t j = 0; j < n; ++j)
      cpu::kernels().convert({DType::f32, x.dtype, a.x_TH + slots[j] / a.topk * a.hidden, x.at(j, 0), a.hidden, false});
    const samoe::Matrix h = product(x, a.w1, a.index1_E[e], up, a.b1, a.factor1_E);
    const samoe::Matrix wide = memory.matrix(DType::f32, n, a.ffn), hidden = memory.matrix(input_type(a.w2.type), n, a.ffn);
    cpu::kernels().activate({DType::f32, DType::f32, h.data, nullptr, n, a.ffn, a.gated, nullptr, wide.data});
    cpu::kernels().convert({DType::f32, hidden.dtype, wide.data, hidden.data, n * a.ffn, false});
    const samoe::Matrix y = product(hidden, a.w2, a.index2_E[e], a.hidden, a.b2, a.factor2_E);
    for (int64_t j = 0; j < n; ++j)
      cpu::kernels().convert({DType::f32, DType::f32, y.at(j, 0), a.y_NH + slots[j] * a.hidden, a.hidden, false});
  });
  if (!a.combine) return;
  share_tokens(a.num_tokens, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin * a.topk; s < end * a.topk; ++s) {
      if (a.ids_TK[s] < 0) continue;
      for (int64_t i = 0; i < a.hidden; ++i) a.out_TH[s / a.topk * a.hidden + i] += a.probs_TK[s] * a.y_NH[s * a.hidden + i];
    }
  });
}

bool takes_products(WeightType type, int64_t num_tokens) {
  const ProductChoice choice = product_choice();
  // int8 by digits of bytes is ahead of products in fp32 wherever either was measured.
  return type != WeightType::i8 && num_tokens >= (type == WeightType::f32 ? choice.fp32_tokens : choice.bf16_tokens);
}

}  // namespace

void run_linear(const cpu::DecodeLinear& a) {
  if (takes_products(a.w_NK.type, a.num_tokens)) return linear_products(a);
  cpu::kernels().decode_linear(a);
}

void run_experts(const cpu::DecodeExperts& a) {
  // Of an expert that has its fair part of the tokens. Rounded products pay from 8 tokens on; a layer's bound is higher, so
  // that batches that are decoded keep fp32.
  const int64_t fair = a.num_tokens * a.topk / std::max<int64_t>(1, a.num_experts);
  const bool pays = rounds(a.w1.type) ? fair >= 8 : takes_products(a.w1.type, fair);
  if (takes_products(a.w1.type, a.num_tokens) && pays) return expert_products(a);
  cpu::kernels().decode_experts(a);
}

}  // namespace decode
}  // namespace samoe
