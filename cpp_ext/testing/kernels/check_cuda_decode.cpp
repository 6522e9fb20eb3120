// As check_cuda_kernels.cpp, for the kernels of inference: every result is compared with the CPU kernels', over sizes that
// fill no warp, vector or tile. Beside that a token must have the same bits alone and among others, and attention the same
// bits whether its parts are blocks of their own or not.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../kernels/cuda/launchers.h"
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
using samoe::Choice;
namespace cpu = samoe::cpu;
namespace cuda = samoe::cuda;

constexpr cudaStream_t kStream = nullptr;
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

template <typename C>
void check_attention(int64_t tokens, int64_t groups, int64_t queries, int64_t dim, int64_t pages_per_slot, bool prepare) {
  what = "attention, " + std::to_string(tokens) + " tokens, " + std::to_string(groups) + " x " + std::to_string(queries) +
         " heads of " + std::to_string(dim);
  const samoe::AttentionCase<C> c(tokens, groups, queries, dim, pages_per_slot, prepare);
  const cuda::CacheBounds bounds = {c.num_slots, c.num_pages, c.length};
  const auto expected = c.run(1, [](const auto& a) { kernels().decode_attention(a); });
  const auto whole = c.run(1, [&](const auto& a) { cuda::decode_attention(a, bounds, nullptr, 0, kStream); });
  expect_near(whole, expected, sizeof(C) == 4 || !prepare ? 1e-4 : 2e-2);
  std::vector<float> room(static_cast<size_t>(tokens * groups * queries * (dim + 2) * (c.length / 256 + 1)), std::nanf(""));
  const auto split = c.run(1, [&](const auto& a) {
    cuda::decode_attention(a, bounds, room.data(), static_cast<int64_t>(room.size()), kStream);
  });
  expect(same_bits(split.data(), whole.data(), static_cast<int64_t>(whole.size())), "bits of attention in parts");
}

void check_experts(const samoe::Experts& experts) {
  const samoe::ExpertsCase e(experts);
  what = "experts, " + std::to_string(e.tokens) + " tokens, top-" + std::to_string(e.topk) + " of " + std::to_string(e.experts);
  std::vector<float> h, y = e.y, out = e.out, y_cpu = y, out_cpu = out;
  const auto run_cuda = [&](int64_t first, int64_t count, float* y_NH, float* out_TH) {
    const auto a = e.arguments(first, count, h, y_NH, out_TH, 1);
    std::vector<char> workspace(static_cast<size_t>(cuda::decode_experts_workspace_bytes(a)));
    cuda::decode_experts(a, e.matrices, e.matrices, workspace.data(), kStream);
  };
  kernels().decode_experts(e.arguments(0, e.tokens, h, y_cpu.data(), out_cpu.data(), 1));
  run_cuda(0, e.tokens, y.data(), out.data());
  expect_near(y, y_cpu, 2e-4);
  expect_near(out, out_cpu, 2e-4);
  if (e.tokens == 0) return;
  const int64_t t = e.tokens / 2;
  std::vector<float> y_alone(e.y.begin() + t * e.topk * e.hidden, e.y.begin() + (t + 1) * e.topk * e.hidden);
  std::vector<float> alone(e.out.begin() + t * e.hidden, e.out.begin() + (t + 1) * e.hidden);
  run_cuda(t, 1, y_alone.data(), alone.data());
  expect(same_bits(alone.data(), out.data() + t * e.hidden, e.hidden), "bits of experts alone and among others");
}

void check_combine_rows(WeightType type, int64_t rows, int64_t cols, const std::vector<float>& coefficients) {
  what = "combination of " + std::to_string(coefficients.size()) + " banks";
  const samoe::CombineRowsCase c(type, rows, cols, coefficients);
  const auto expected = c.run(type, 1, [](const auto& a) { kernels().combine_rows(a); });
  const auto got = c.run(type, 1, [](const auto& a) { cuda::combine_rows(a, kStream); });
  expect_near(got, expected, type == WeightType::f32 ? 1e-6 : 1e-2);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t many = argc > 1 ? std::atoll(argv[1]) : 33;
  for (const WeightType type : samoe::kWeightTypes) {
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
