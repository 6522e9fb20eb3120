// As check_kernels.cpp, for the kernels of inference and the optimizer's update: results must have the same bits with one
// thread and with three, and products, sums and updates are compared with plain loops.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "../../kernels/kernels.h"
#include "decode_cases.h"

namespace {

using samoe::Weights;
using samoe::WeightType;
using samoe::expect;
using samoe::floats;
using samoe::near;
using samoe::pick;
using samoe::cpu::kernels;

constexpr int kThreads = 3;

bool equal_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Runs a kernel with one thread and with several on copies of what it writes; returns the result.
std::vector<float> same_bits(const std::vector<float>& before, const char* what,
                             const std::function<void(float* out, int num_threads)>& kernel) {
  std::vector<float> one = before, many = before;
  kernel(one.data(), 1);
  kernel(many.data(), kThreads);
  expect(equal_bits(one, many), what);
  return one;
}

void check_linear(WeightType type) {
  const int64_t tokens = pick(0, 20), inputs = pick(1, 90), outputs = pick(1, 150);
  const auto x = floats(tokens * inputs), bias = floats(outputs), before = floats(tokens * outputs);
  const Weights w(outputs, inputs, type);
  const bool accumulate = pick(0, 1) == 1;
  const auto out = same_bits(before, "bits of a product", [&](float* result, int num_threads) {
    kernels().decode_linear({x.data(), w.matrix, bias.data(), tokens, inputs, outputs, accumulate, result, num_threads});
  });
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t n = 0; n < outputs; ++n) {
      double expected = bias[n] + (accumulate ? before[t * outputs + n] : 0.0f);
      for (int64_t k = 0; k < inputs; ++k) expected += static_cast<double>(x[t * inputs + k]) * w.values[n * inputs + k];
      expect(near(out[t * outputs + n], expected, 1e-4), "product");
    }
  }
}

void check_norm() {
  const int64_t tokens = pick(0, 9), hidden = pick(1, 90);
  const auto x = floats(tokens * hidden), weight = floats(hidden), bias = floats(hidden);
  const bool rms = pick(0, 1) == 1;
  const auto out = same_bits(floats(tokens * hidden), "bits of a norm", [&](float* result, int num_threads) {
    kernels().decode_norm({x.data(), weight.data(), bias.data(), 1e-5f, rms, tokens, hidden, result, num_threads});
  });
  for (int64_t t = 0; t < tokens; ++t) {
    double mean = 0, square = 0;
    for (int64_t h = 0; h < hidden; ++h) mean += x[t * hidden + h];
    mean = rms ? 0 : mean / static_cast<double>(hidden);
    for (int64_t h = 0; h < hidden; ++h) square += (x[t * hidden + h] - mean) * (x[t * hidden + h] - mean);
    const double root = std::sqrt(square / static_cast<double>(hidden) + 1e-5);
    for (int64_t h = 0; h < hidden; ++h)
      expect(near(out[t * hidden + h], (x[t * hidden + h] - mean) / root * weight[h] + bias[h], 1e-4), "norm");
  }
}

template <typename C>
void check_attention() {
  const samoe::AttentionCase<C> c(pick(1, 5), pick(1, 3), pick(1, 4), 2 * pick(1, 20), 3, pick(0, 1) == 1);
  const auto run = [&](int num_threads) {
    return c.run(num_threads, [](const auto& a) { kernels().decode_attention(a); });
  };
  const auto out = run(1);
  expect(equal_bits(out, run(kThreads)), "bits of attention");
  for (const float value : out) expect(std::isfinite(value), "attention");
}

void check_experts(WeightType type) {
  const int64_t experts = pick(1, 6);
  const samoe::ExpertsCase c({type, pick(0, 20), experts, pick(1, experts), pick(1, 70), pick(1, 150), pick(0, 1) == 1,
                              pick(0, 1) == 1, samoe::Choice::any});
  same_bits(c.out, "bits of experts", [&](float* result, int num_threads) {
    std::vector<float> h, y = c.y;
    kernels().decode_experts(c.arguments(0, c.tokens, h, y.data(), result, num_threads));
  });
}

// Two layers, the second one with a shared expert that is mixed with the chosen ones by each token, of tokens of some sequences: everything that a step's threads share.
void check_step(WeightType type) {
  const int64_t tokens = pick(1, 12), hidden = 2 * pick(1, 40), ffn = pick(1, 70), experts = pick(1, 5), topk = pick(1, experts);
  const int64_t groups = pick(1, 3), queries = pick(1, 2), dim = 2 * pick(1, 12), vocab = pick(2, 90), pages_per_slot = 2;
  const int64_t width = groups * (queries + 2) * dim, inner = groups * queries * dim, page = samoe::cpu::kPage;
  const int64_t num_pages = tokens * pages_per_slot, rows = pick(0, tokens);
  const bool gated = pick(0, 1) == 1;
  const int64_t up = gated ? 2 * ffn : ffn;
  const Weights words(vocab, hidden, type), head(vocab, hidden, type), router(experts, hidden, WeightType::f32);
  const Weights qkv(width, hidden, type), output(hidden, inner, type);
  const Weights w1(experts * up, hidden, type), w2(experts * hidden, ffn, type);
  const Weights mixing(2, hidden, WeightType::f32);
  const auto bias = floats(experts), scale = floats(1);
  auto candidates = floats(experts);
  for (float& factor : candidates) factor = pick(0, 3) == 0 ? 0.0f : std::abs(factor);
  const bool by_norm = pick(0, 1) == 1, in_groups = pick(0, 1) == 1;
  const auto norm = floats(hidden), cosines = floats(pages_per_slot * page * dim), cache = floats(num_pages * groups * dim * page);
  std::vector<int64_t> ids, wanted, index, zeros(static_cast<size_t>(tokens));
  std::vector<int32_t> positions, slots, pages;
  for (int64_t t = 0; t < tokens; ++t) {
    ids.push_back(pick(0, vocab - 1));
    positions.push_back(static_cast<int32_t>(t % 2 == 1 ? positions.back() + 1 : pick(0, page)));
    slots.push_back(static_cast<int32_t>(t / 2));  // two tokens of a sequence in one step
  }
  for (int64_t p = 0; p < num_pages; ++p) pages.push_back(static_cast<int32_t>(p));
  for (int64_t n = 0; n < rows; ++n) wanted.push_back(pick(0, tokens - 1));
  for (int64_t e = 0; e < experts; ++e) index.push_back(e);
  same_bits(floats(rows * vocab), "bits of a step", [&](float* result, int num_threads) {
    const auto room = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count)); };
    auto x = room(tokens * hidden), normed = x, projected = room(tokens * width), prepared = projected;
    auto attended = room(tokens * inner), logits = room(tokens * experts), probs = room(tokens * topk), last = room(2 * rows * hidden);
    auto h = room(tokens * topk * ffn), y = room(tokens * topk * std::max(hidden, ffn)), shared_y = room(tokens * hidden);
    auto mixed = room(tokens * 2), shared_probs = room(tokens);
    std::vector<int64_t> chosen(static_cast<size_t>(tokens * topk));
    std::vector<std::vector<float>> keys(2, cache), values(2, cache);
    std::vector<samoe::cpu::DecodeLayer> layers(2);
    for (size_t l = 0; l < 2; ++l) {
      auto& layer = layers[l];
      layer.attention_norm = layer.mlp_norm = {x.data(), norm.data(), nullptr, 1e-5f, true, 0, hidden, normed.data(), 0};
      layer.qkv = {normed.data(), qkv.matrix, nullptr, 0, hidden, width, false, projected.data(), 0};
      auto& a = layer.attention;
      a.qkv = projected.data();
      a.cos_PR = a.sin_PR = cosines.data();
      a.rotated = dim;
      a.keys = keys[l].data();
      a.values = values[l].data();
      a.kv_heads = groups;
      a.queries_per_kv = queries;
      a.head_dim = dim;
      a.qkv_scratch = prepared.data();
      a.out = attended.data();
      layer.output = {attended.data(), output.matrix, nullptr, 0, inner, hidden, true, x.data(), 0};
      layer.router = {normed.data(), router.matrix, nullptr, 0, hidden, experts, false, logits.data(), 0};
      layer.choice = {logits.data(), 0, experts, topk, false, false, probs.data(), chosen.data()};
      layer.experts = {normed.data(), chosen.data(), probs.data(), 0, topk, experts, index.data(), index.data(), w1.matrix, w2.matrix,
                       nullptr, nullptr, nullptr, nullptr, hidden, ffn, gated, h.data(), y.data(), true, x.data(), 0};
      if (l == 0) continue;
      layer.mixing = {normed.data(), mixing.matrix, nullptr, 0, hidden, 2, false, mixed.data(), 0};
      auto& choice = layer.choice;
      choice.norm_scale = by_norm ? scale.data() : nullptr;
      choice.bias_E = bias.data();
      choice.candidates_E = candidates.data();
      choice.num_groups = in_groups ? experts : 0;
      choice.group_topk = topk;
      choice.mixing_T2 = mixed.data();
      choice.shared_T = shared_probs.data();
      layer.shared = layer.experts;
      layer.shared.ids_TK = zeros.data();
      layer.shared.probs_TK = shared_probs.data();
      layer.shared.topk = 1;
      layer.shared.h_NF = y.data();  // as plans lay them out: over what the routed experts need no more
      layer.shared.y_NH = shared_y.data();
    }
    samoe::cpu::DecodeStep step = {ids.data(), positions.data(), slots.data(), pages.data(), pages_per_slot, tokens, hidden,
                                   words.matrix, nullptr, x.data(), layers.data(), 2, wanted.data(), rows, last.data(), {}, {},
                                   num_threads};
    step.final_norm = {last.data(), norm.data(), nullptr, 1e-5f, true, 0, hidden, last.data() + rows * hidden, 0};
    step.head = {last.data() + rows * hidden, head.matrix, nullptr, 0, hidden, vocab, false, result, 0};
    kernels().decode_step(step);
  });
}

void check_combine_rows(WeightType type) {
  const samoe::CombineRowsCase c(type, pick(1, 30), pick(1, 90), floats(pick(1, 5)));
  const auto run = [&](int num_threads) {
    return c.run(WeightType::f32, num_threads, [](const auto& a) { kernels().combine_rows(a); });
  };
  const auto out = run(1);
  expect(equal_bits(out, run(kThreads)), "bits of combined rows");
  for (size_t i = 0; i < out.size(); ++i) {
    double expected = 0;
    for (size_t p = 0; p < c.banks.size(); ++p) expected += static_cast<double>(c.coefficients[p]) * c.banks[p].values[i];
    expect(near(out[i], expected, 1e-5), "combined rows");
  }
}

// Singular values of a rank-one matrix: all but one are 0, so the result is the matrix times one polynomial.
void check_newton_schulz() {
  const int at_once = static_cast<int>(pick(1, 4));
  const int64_t num = pick(0, 4), rows = pick(1, 40), columns = pick(1, 40);
  std::vector<float> x(static_cast<size_t>(num * rows * columns));
  std::vector<double> norms;
  for (int64_t i = 0; i < num; ++i) {
    const auto left = floats(rows), right = floats(columns);
    double square = 0;
    for (int64_t at = 0; at < rows * columns; ++at) {
      float& value = x[static_cast<size_t>(i * rows * columns + at)];
      value = left[at / columns] * right[at % columns];
      square += static_cast<double>(value) * value;
    }
    norms.push_back(std::sqrt(square));
  }
  const auto out = same_bits(floats(num * rows * columns), "bits of Newton-Schulz", [&](float* result, int num_threads) {
    kernels().newton_schulz({x.data(), num, rows, columns, 3, at_once, 3.4445f, -4.7750f, 2.0315f, 1e-7f, 0.5f, result, num_threads});
  });
  double value = 1;
  for (int step = 0; step < 3; ++step) value = 3.4445 * value - 4.7750 * std::pow(value, 3) + 2.0315 * std::pow(value, 5);
  for (size_t at = 0; at < out.size(); ++at) {
    const double norm = norms[at / static_cast<size_t>(rows * columns)];
    expect(near(out[at], norm > 1e-7 ? 0.5 * value * x[at] / norm : 0.0, 1e-4), "Newton-Schulz");
  }
}

void check_adamw() {
  const int64_t num = pick(0, 1) == 1 ? pick(0, 100) : pick(16000, 50000);
  const auto before = floats(num), grad = floats(num), first = floats(num);
  auto second = floats(num);
  for (float& value : second) value *= value;
  const auto out = same_bits(before, "bits of an update", [&](float* master, int num_threads) {
    std::vector<float> exp_avg = first, exp_avg_sq = second;
    std::vector<uint16_t> weight(static_cast<size_t>(num));
    const samoe::cpu::AdamWRun run = {master, weight.data(), grad.data(), exp_avg.data(), exp_avg_sq.data(), num};
    kernels().adamw({&run, 1, 0.999f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.05f, 1e-3f, 1.2f, 0.5f, num_threads});
  });
  for (int64_t i = 0; i < num; ++i) {
    const double g = 0.5 * grad[i], m = first[i] + 0.1 * (g - first[i]), v = 0.95 * second[i] + 0.05 * g * g;
    expect(near(out[i], 0.999 * before[i] - 1e-3 * m / (1.2 * std::sqrt(v) + 1e-8), 1e-5), "update");
  }
}

}  // namespace

int main() {
  for (int round = 0; round < 20; ++round) {
    for (const WeightType type : samoe::kWeightTypes) {
      check_linear(type);
      check_experts(type);
      check_step(type);
      check_combine_rows(type);
    }
    check_norm();
    check_attention<float>();
    check_attention<uint16_t>();
    check_adamw();
    check_newton_schulz();
  }
  std::printf("20 rounds of inference's kernels and of AdamW agree (%s)\n", kernels().instruction_set);
  return 0;
}
