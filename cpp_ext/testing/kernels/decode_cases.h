// Random inputs of inference's kernels, whose arguments point into them, for the CPU's checks and for CUDA's.
#pragma once

#include <functional>

#include "checks.h"

namespace samoe {

constexpr WeightType kWeightTypes[] = {WeightType::f32, WeightType::bf16, WeightType::i8};

// Several tokens of sequences at different positions, over pages that lie anywhere. C: what the cache holds.
template <typename C>
struct AttentionCase {
  AttentionCase(int64_t tokens, int64_t groups, int64_t queries, int64_t dim, int64_t pages_per_slot, bool prepare)
      : tokens(tokens), groups(groups), queries(queries), dim(dim), pages_per_slot(pages_per_slot), prepare(prepare),
        num_slots((tokens + 1) / 2), num_pages(num_slots * pages_per_slot), length(pages_per_slot * cpu::kPage),
        rotated(dim / 4 * 2), qkv(floats(tokens * groups * (queries + 2) * dim)), norm(floats(dim)),
        cosines(floats(length * rotated)), sines(floats(length * rotated)) {
    for (int64_t t = 0; t < tokens; ++t) {
      // Pairs of neighbours in one sequence; the first sequence is full.
      const int64_t second = t % 2 == 1 ? positions.back() + 1 : (t == 0 ? length - 2 : pick(0, length - 2));
      positions.push_back(static_cast<int32_t>(second));
      slots.push_back(static_cast<int32_t>(num_slots - 1 - t / 2));
    }
    for (int64_t p = 0; p < num_pages; ++p) pages.push_back(static_cast<int32_t>((p * 7 + 3) % num_pages));  // 7: no divisor
    cache.resize(static_cast<size_t>(num_pages * groups * dim * cpu::kPage));
    for (C& value : cache)
      value = static_cast<C>(sizeof(C) == 4 ? 0.25 * static_cast<double>(pick(-9, 9)) : pick(0, 1) * 0x8000 + 0x3e80 + pick(0, 255));
  }

  // Runs on copies of the cache, and returns the result behind keys and values.
  std::vector<float> run(int num_threads, const std::function<void(const cpu::DecodeAttention&)>& kernel) const {
    std::vector<C> keys = cache, values = cache;
    std::vector<float> scratch(qkv.size()), out(static_cast<size_t>(tokens * groups * queries * dim), std::nanf(""));
    cpu::DecodeAttention a = {};
    a.qkv = qkv.data();
    if (prepare) a.q_norm_D = a.k_norm_D = norm.data();
    a.epsilon = 1e-5f;
    a.rms = dim % 3 == 0;
    if (prepare) a.cos_PR = cosines.data(), a.sin_PR = sines.data(), a.rotated = rotated;
    a.positions_T = positions.data();
    a.slots_T = slots.data();
    a.pages = pages.data();
    a.pages_per_slot = pages_per_slot;
    a.cache_is_bf16 = sizeof(C) == 2;
    a.keys = keys.data();
    a.values = values.data();
    a.num_tokens = tokens;
    a.kv_heads = groups;
    a.queries_per_kv = queries;
    a.head_dim = dim;
    a.qkv_scratch = scratch.data();
    a.out = out.data();
    a.num_threads = num_threads;
    kernel(a);
    for (const auto* side : {&keys, &values})
      for (const C value : *side) out.push_back(value_of(value));
    return out;
  }

  int64_t tokens, groups, queries, dim, pages_per_slot;
  bool prepare;  // norm and rotation
  int64_t num_slots, num_pages, length, rotated;
  std::vector<float> qkv, norm, cosines, sines;
  std::vector<int32_t> positions, slots, pages;
  std::vector<C> cache;
};

enum class Choice { any, one_expert, few };

struct Experts {
  WeightType type;
  int64_t tokens, experts, topk, hidden, ffn;
  bool gated, extras;
  Choice choice;
};

struct ExpertsCase : Experts {
  explicit ExpertsCase(const Experts& e)
      : Experts(e), up(gated ? 2 * ffn : ffn), matrices(experts < 6 ? experts + 1 : 6), x(floats(tokens * hidden)),
        probs(floats(tokens * topk)), b1(floats(matrices * up)), b2(floats(matrices * hidden)), factor1(floats(experts)),
        factor2(floats(experts)), y(floats(tokens * topk * hidden)), out(floats(tokens * hidden)),
        w1(matrices * up, hidden, type), w2(matrices * hidden, ffn, type) {
    for (int64_t s = 0; s < tokens * topk; ++s)
      ids.push_back(choice == Choice::any ? pick(0, experts - 1) : (choice == Choice::few ? pick(0, experts / 4) : experts - 1));
    for (int64_t i = 0; i < experts; ++i) {
      index1.push_back(choice == Choice::any && i % 3 == 1 ? -1 : pick(0, matrices - 1));
      index2.push_back(index1.back() < 0 ? -1 : pick(0, matrices - 1));
    }
  }

  // `count` tokens from `first` on. Results of experts that are left out stay as they were.
  cpu::DecodeExperts arguments(int64_t first, int64_t count, std::vector<float>& h, float* y_NH, float* out_TH, int num_threads) const {
    h.resize(static_cast<size_t>(tokens * topk * ffn));
    cpu::DecodeExperts a = {};
    a.x_TH = x.data() + first * hidden;
    a.ids_TK = ids.data() + first * topk;
    a.probs_TK = probs.data() + first * topk;
    a.num_tokens = count;
    a.topk = topk;
    a.num_experts = experts;
    a.index1_E = index1.data();
    a.index2_E = index2.data();
    a.w1 = w1.matrix;
    a.w2 = w2.matrix;
    if (extras) a.b1 = b1.data(), a.b2 = b2.data(), a.factor1_E = factor1.data(), a.factor2_E = factor2.data();
    a.hidden = hidden;
    a.ffn = ffn;
    a.gated = gated;
    a.h_NF = h.data();
    a.y_NH = y_NH;
    a.combine = true;
    a.out_TH = out_TH;
    a.num_threads = num_threads;
    return a;
  }

  int64_t up, matrices;
  std::vector<float> x, probs, b1, b2, factor1, factor2, y, out;  // y, out: before
  Weights w1, w2;
  std::vector<int64_t> ids, index1, index2;
};

struct CombineRowsCase {
  CombineRowsCase(WeightType type, int64_t rows, int64_t cols, const std::vector<float>& coefficients)
      : rows(rows), cols(cols), coefficients(coefficients) {
    for (size_t p = 0; p < coefficients.size(); ++p) banks.emplace_back(rows, cols, type);
    for (const Weights& bank : banks) matrices.push_back(bank.matrix);
  }

  // Runs a kernel and returns the weights that it stored.
  std::vector<float> run(WeightType type, int num_threads, const std::function<void(const cpu::CombineRows&)>& kernel) const {
    const size_t size = type == WeightType::f32 ? 4 : (type == WeightType::bf16 ? 2 : 1);
    std::vector<char> out(static_cast<size_t>(rows * cols) * size);
    std::vector<float> scale(static_cast<size_t>(rows), 1.0f), result;
    kernel({matrices.data(), coefficients.data(), static_cast<int64_t>(coefficients.size()), rows, cols, type, out.data(),
            scale.data(), num_threads});
    for (int64_t i = 0; i < rows * cols; ++i) {
      uint32_t bits = 0;
      std::memcpy(size == 2 ? reinterpret_cast<char*>(&bits) + 2 : reinterpret_cast<char*>(&bits), &out[i * size], size);
      float value;
      std::memcpy(&value, &bits, sizeof value);
      result.push_back(size == 1 ? static_cast<float>(static_cast<int8_t>(out[i])) * scale[i / cols] : value);
    }
    return result;
  }

  int64_t rows, cols;
  std::vector<float> coefficients;
  std::vector<Weights> banks;
  std::vector<cpu::Matrix> matrices;
};

}  // namespace samoe
