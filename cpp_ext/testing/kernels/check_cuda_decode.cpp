// As check_cuda_kernels.cpp, for the kernels of inference: every result is compared with the CPU kernels', over sizes that
// fill no warp, vector or tile. Beside that a token must have the same bits alone and among others, and attention the same
// bits whether its parts are blocks of their own or not.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../kernels/cuda/launchers.h"
#include "../../kernels/kernels.h"
#include "checks.h"

namespace {

using samoe::Weights;
using samoe::WeightType;
using samoe::expect;
using samoe::floats;
using samoe::near;
using samoe::pick;
using samoe::cpu::kernels;
using samoe::cpu::kPage;
namespace cpu = samoe::cpu;
namespace cuda = samoe::cuda;

constexpr cudaStream_t kStream = nullptr;
constexpr WeightType kTypes[] = {WeightType::f32, WeightType::bf16, WeightType::i8};
std::string what;  // the case at hand

void expect_near(const std::vector<float>& got, const std::vector<float>& expected, double tolerance) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (near(got[i], expected[i], tolerance) || (std::isnan(got[i]) && std::isnan(expected[i]))) continue;
    std::fprintf(stderr, "difference: %s, [%zu] is %.9g, on the CPU %.9g\n", what.c_str(), i, static_cast<double>(got[i]),
                 static_cast<double>(expected[i]));
    std::exit(1);
  }
}

bool same_bits(const float* a, const float* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

void check_linear(WeightType type, int64_t tokens, int64_t inputs, int64_t outputs, bool extras) {
  what = "linear, " + std::to_string(tokens) + " tokens, " + std::to_string(inputs) + " x " + std::to_string(outputs);
  auto x = floats(tokens * inputs);
  const auto bias = floats(outputs), before = floats(tokens * outputs);
  if (tokens == 7) x[2 * inputs + inputs - 1] = std::nanf("");
  const Weights w(outputs, inputs, type);
  const auto arguments = [&](int64_t first, int64_t count, float* out) {
    cpu::DecodeLinear a = {};
    a.x_TK = x.data() + first * inputs;
    a.w_NK = w.matrix;
    a.bias_N = extras ? bias.data() : nullptr;
    a.num_tokens = count;
    a.inputs = inputs;
    a.outputs = outputs;
    a.accumulate = extras;
    a.out_TN = out;
    a.num_threads = 1;
    return a;
  };
  std::vector<float> got = before, expected = before;
  kernels().decode_linear(arguments(0, tokens, expected.data()));
  cuda::decode_linear(arguments(0, tokens, got.data()), kStream);
  expect_near(got, expected, 1e-4);
  for (int64_t t = 0; t < tokens; t += 5) {
    std::vector<float> alone(before.begin() + t * outputs, before.begin() + (t + 1) * outputs);
    cuda::decode_linear(arguments(t, 1, alone.data()), kStream);
    expect(same_bits(alone.data(), got.data() + t * outputs, outputs), "bits of a product alone and among others");
  }
}

void check_norm(int64_t tokens, int64_t hidden, bool rms) {
  what = "norm of " + std::to_string(hidden);
  const auto x = floats(tokens * hidden), weight = floats(hidden), bias = floats(hidden);
  std::vector<float> got = floats(tokens * hidden), expected = got;
  const auto arguments = [&](float* out) {
    return cpu::DecodeNorm{x.data(), weight.data(), rms ? nullptr : bias.data(), 1e-5f, rms, tokens, hidden, out, 1};
  };
  kernels().decode_norm(arguments(expected.data()));
  cuda::decode_norm(arguments(got.data()), kStream);
  expect_near(got, expected, 1e-5);
}

// Several tokens of sequences at different positions, over pages that lie anywhere.
template <typename C>
void check_attention(int64_t tokens, int64_t groups, int64_t queries, int64_t dim, int64_t pages_per_slot, bool prepare) {
  what = "attention, " + std::to_string(tokens) + " tokens, " + std::to_string(groups) + " x " + std::to_string(queries) +
         " heads of " + std::to_string(dim);
  const int64_t num_slots = (tokens + 1) / 2, num_pages = num_slots * pages_per_slot, length = pages_per_slot * kPage;
  const auto qkv = floats(tokens * groups * (queries + 2) * dim), norm = floats(dim);
  const int64_t rotated = dim / 4 * 2;
  const auto cosines = floats(length * rotated), sines = floats(length * rotated);
  std::vector<int32_t> positions, slots, pages(static_cast<size_t>(num_pages));
  for (int64_t t = 0; t < tokens; ++t) {
    // Pairs of neighbours in one sequence; the first sequence is full.
    const int64_t second = t % 2 == 1 ? positions.back() + 1 : (t == 0 ? length - 2 : pick(0, length - 2));
    positions.push_back(static_cast<int32_t>(second));
    slots.push_back(static_cast<int32_t>(num_slots - 1 - t / 2));
  }
  for (int64_t p = 0; p < num_pages; ++p) pages[p] = static_cast<int32_t>((p * 7 + 3) % num_pages);  // 7: no divisor
  std::vector<C> cache(static_cast<size_t>(num_pages * groups * dim * kPage));
  for (C& value : cache) value = static_cast<C>(sizeof(C) == 4 ? 0.25 * static_cast<double>(pick(-9, 9)) : pick(0, 1) * 0x8000 + 0x3e80 + pick(0, 255));
  // Runs on copies of the cache, and returns the result behind keys and values.
  const auto run = [&](const std::function<void(const cpu::DecodeAttention&)>& kernel) {
    std::vector<C> keys = cache, values = cache;
    std::vector<float> scratch(qkv.size()), out = floats(tokens * groups * queries * dim);
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
    a.num_threads = 1;
    kernel(a);
    for (const auto* side : {&keys, &values}) {
      for (const C value : *side) {
        const uint32_t bits = static_cast<uint32_t>(value) << 16;
        float wide;
        std::memcpy(&wide, &bits, sizeof wide);
        out.push_back(sizeof(C) == 4 ? static_cast<float>(value) : wide);
      }
    }
    return out;
  };
  const cuda::CacheBounds bounds = {num_slots, num_pages, length};
  const auto expected = run([](const cpu::DecodeAttention& a) { kernels().decode_attention(a); });
  const auto whole = run([&](const cpu::DecodeAttention& a) { cuda::decode_attention(a, bounds, nullptr, 0, kStream); });
  expect_near(whole, expected, sizeof(C) == 4 || !prepare ? 1e-4 : 2e-2);
  std::vector<float> room(static_cast<size_t>(tokens * groups * queries * (dim + 2) * (length / 256 + 1)), std::nanf(""));
  const auto split = run([&](const cpu::DecodeAttention& a) {
    cuda::decode_attention(a, bounds, room.data(), static_cast<int64_t>(room.size()), kStream);
  });
  expect(same_bits(split.data(), whole.data(), static_cast<int64_t>(whole.size())), "bits of attention in parts");
}

enum class Choice { any, one_expert, few };

struct Experts {
  WeightType type;
  int64_t tokens, experts, topk, hidden, ffn;
  bool gated, extras;
  Choice choice;
};

void check_experts(const Experts& e) {
  what = "experts, " + std::to_string(e.tokens) + " tokens, top-" + std::to_string(e.topk) + " of " + std::to_string(e.experts);
  const int64_t up = e.gated ? 2 * e.ffn : e.ffn, matrices = e.experts < 6 ? e.experts + 1 : 6, slots = e.tokens * e.topk;
  const auto x = floats(e.tokens * e.hidden), probs = floats(slots), b1 = floats(matrices * up);
  const auto b2 = floats(matrices * e.hidden), factor1 = floats(e.experts), factor2 = floats(e.experts);
  const Weights w1(matrices * up, e.hidden, e.type), w2(matrices * e.hidden, e.ffn, e.type);
  std::vector<int64_t> ids(static_cast<size_t>(slots)), index1, index2;
  for (int64_t s = 0; s < slots; ++s)
    ids[s] = e.choice == Choice::any ? pick(0, e.experts - 1) : (e.choice == Choice::few ? pick(0, e.experts / 4) : e.experts - 1);
  for (int64_t i = 0; i < e.experts; ++i) {
    index1.push_back(e.choice == Choice::any && i % 3 == 1 ? -1 : pick(0, matrices - 1));
    index2.push_back(index1.back() < 0 ? -1 : pick(0, matrices - 1));
  }
  // Results of experts that are left out stay as they were.
  const auto y_before = floats(slots * e.hidden), out_before = floats(e.tokens * e.hidden);
  const auto arguments = [&](int64_t first, int64_t count, std::vector<float>& h, float* y, float* out) {
    cpu::DecodeExperts a = {};
    a.x_TH = x.data() + first * e.hidden;
    a.ids_TK = ids.data() + first * e.topk;
    a.probs_TK = probs.data() + first * e.topk;
    a.num_tokens = count;
    a.topk = e.topk;
    a.num_experts = e.experts;
    a.index1_E = index1.data();
    a.index2_E = index2.data();
    a.w1 = w1.matrix;
    a.w2 = w2.matrix;
    if (e.extras) a.b1 = b1.data(), a.b2 = b2.data(), a.factor1_E = factor1.data(), a.factor2_E = factor2.data();
    a.hidden = e.hidden;
    a.ffn = e.ffn;
    a.gated = e.gated;
    a.h_NF = h.data();
    a.y_NH = y;
    a.combine = true;
    a.out_TH = out;
    a.num_threads = 1;
    return a;
  };
  const auto run_cuda = [&](const cpu::DecodeExperts& a) {
    std::vector<char> workspace(static_cast<size_t>(cuda::decode_experts_workspace_bytes(a)));
    cuda::decode_experts(a, matrices, matrices, workspace.data(), kStream);
  };
  std::vector<float> h(static_cast<size_t>(slots * e.ffn)), y = y_before, out = out_before, y_cpu = y, out_cpu = out;
  kernels().decode_experts(arguments(0, e.tokens, h, y_cpu.data(), out_cpu.data()));
  run_cuda(arguments(0, e.tokens, h, y.data(), out.data()));
  expect_near(y, y_cpu, 2e-4);
  expect_near(out, out_cpu, 2e-4);
  if (e.tokens == 0) return;
  const int64_t t = e.tokens / 2;
  std::vector<float> y_alone(y_before.begin() + t * e.topk * e.hidden, y_before.begin() + (t + 1) * e.topk * e.hidden);
  std::vector<float> alone(out_before.begin() + t * e.hidden, out_before.begin() + (t + 1) * e.hidden);
  run_cuda(arguments(t, 1, h, y_alone.data(), alone.data()));
  expect(same_bits(alone.data(), out.data() + t * e.hidden, e.hidden), "bits of experts alone and among others");
}

void check_combine_rows(WeightType type, int64_t rows, int64_t cols, const std::vector<float>& coefficients) {
  what = "combination of " + std::to_string(coefficients.size()) + " banks";
  std::vector<Weights> banks;
  std::vector<cpu::Matrix> matrices;
  for (size_t p = 0; p < coefficients.size(); ++p) banks.emplace_back(rows, cols, type);
  for (const Weights& bank : banks) matrices.push_back(bank.matrix);
  const size_t size = type == WeightType::f32 ? 4 : (type == WeightType::bf16 ? 2 : 1);
  // Runs a kernel and returns the weights that it stored.
  const auto run = [&](const std::function<void(const cpu::CombineRows&)>& kernel) {
    std::vector<char> out(static_cast<size_t>(rows * cols) * size);
    std::vector<float> scale(static_cast<size_t>(rows), 1.0f), result;
    kernel({matrices.data(), coefficients.data(), static_cast<int64_t>(coefficients.size()), rows, cols, type, out.data(),
            scale.data(), 1});
    for (int64_t i = 0; i < rows * cols; ++i) {
      uint32_t bits = 0;
      std::memcpy(size == 2 ? reinterpret_cast<char*>(&bits) + 2 : reinterpret_cast<char*>(&bits), &out[i * size], size);
      float value;
      std::memcpy(&value, &bits, sizeof value);
      result.push_back(size == 1 ? static_cast<float>(static_cast<int8_t>(out[i])) * scale[i / cols] : value);
    }
    return result;
  };
  const auto expected = run([](const cpu::CombineRows& a) { kernels().combine_rows(a); });
  const auto got = run([](const cpu::CombineRows& a) { cuda::combine_rows(a, kStream); });
  expect_near(got, expected, type == WeightType::f32 ? 1e-6 : 1e-2);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t many = argc > 1 ? std::atoll(argv[1]) : 33;
  for (const WeightType type : kTypes) {
    for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{7}, many}) {
      check_linear(type, tokens, 64, 21, tokens == 7);
      check_linear(type, tokens, 37, 11, tokens != 7);
    }
    check_linear(type, 9, 4112, 6, true);  // long enough for slices, in which a warp has inputs of its own
    check_linear(type, 2, 1, 130, false);
    for (const bool gated : {false, true}) {
      for (const bool extras : {false, true}) {
        check_experts({type, many, 5, 2, 32, 75, gated, extras, Choice::any});
        check_experts({type, 7, 9, 8, 37, 48, gated, extras, Choice::few});
        check_experts({type, 1, 1, 1, 36, 7, gated, extras, Choice::one_expert});
      }
    }
    check_experts({type, many, 4, 1, 16, 16, true, true, Choice::one_expert});
    check_combine_rows(type, 7, 45, {0.5f, -1.25f, 0.0f});
    check_combine_rows(type, 9, 160, {0.0f, 0.0f, 1.0f, 2.0f});
    check_combine_rows(type, 3, 8, {0.0f});
  }
  check_experts({WeightType::f32, 0, 4, 2, 8, 8, false, false, Choice::any});
  check_experts({WeightType::f32, many, 600, 3, 8, 8, false, false, Choice::any});  // three rounds of experts
  for (const int64_t hidden : {1, 5, 131, 1000}) check_norm(3, hidden, false), check_norm(3, hidden, true);
  check_norm(0, 8, true);
  for (const bool prepare : {false, true}) {
    check_attention<float>(1, 1, 1, 16, 2, prepare);
    check_attention<float>(3, 2, 2, 20, 3, prepare);
    check_attention<float>(2, 1, 5, 64, 33, prepare);  // three chunks
    check_attention<float>(2, 2, 3, 13, 18, prepare);
    check_attention<uint16_t>(2, 1, 4, 128, 20, prepare);
    check_attention<uint16_t>(7, 3, 1, 64, 2, prepare);
    check_attention<uint16_t>(3, 1, 9, 30, 17, prepare);
    check_attention<uint16_t>(1, 1, 2, 256, 3, prepare);
  }
  std::printf("the CUDA kernels of inference, emulated, agree with the CPU's (%s)\n", kernels().instruction_set);
  return 0;
}
