// A program without torch and without a GPU that runs the CUDA kernels' own source through cuda_emulation.h and compares
// every result with the CPU kernels', over sizes that fill no warp, vector or tile. Ends with status 1 at the first
// difference. Buffers have their exact size on the heap, for AddressSanitizer, under which an argument, the largest number
// of tokens in place of 513, saves time.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/cuda/launchers.h"
#include "../../kernels/kernels.h"
#include "../stand_ins/cuda_emulation.h"
#include "checks.h"

namespace {

using samoe::DType;
using samoe::cpu::kernels;
using samoe::pick;
using samoe::value_of;
namespace cuda = samoe::cuda;

constexpr cudaStream_t kStream = nullptr;
std::string what;  // the case at hand

template <typename T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> values;
  for (const float x : samoe::floats(n)) values.push_back(sizeof(T) == 4 ? static_cast<T>(x) : static_cast<T>(samoe::high_half(x)));
  return values;
}

template <typename T>
std::vector<T> zeros(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n), T{});
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::bf16;
}

// Integers equal; floats to a tolerance of the type, NaN like NaN, infinity like itself.
template <typename T>
void expect_equal(const char* name, const std::vector<T>& got, const std::vector<T>& expected, double tolerance = 0) {
  for (size_t i = 0; i < got.size(); ++i) {
    bool equal = got[i] == expected[i];
    double a = 0, b = 0;
    if constexpr (sizeof(T) <= 4) {
      a = value_of(got[i]), b = value_of(expected[i]);
      if (tolerance == 0) tolerance = sizeof(T) == 4 ? 2e-5 : 1.6e-2;
      equal = equal || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b));
    } else {
      a = static_cast<double>(got[i]), b = static_cast<double>(expected[i]);
    }
    if (equal) continue;
    std::fprintf(stderr, "difference: %s, %s[%zu] is %.9g, on the CPU %.9g\n", what.c_str(), name, i, a, b);
    std::exit(1);
  }
}

struct GateResults {
  GateResults(int64_t tokens, int64_t experts, int64_t topk, int64_t groups)
      : probs(tokens * topk), sums(groups * experts), z(1), logsumexp(tokens), gradient(tokens * experts),
        ids(tokens * topk), counts(groups * experts) {}
  std::vector<float> probs, sums, z, logsumexp, gradient;
  std::vector<int64_t> ids, counts;
};

void check_gate(int64_t groups, int64_t group_tokens, int64_t experts, int64_t topk, bool sigmoid, bool pre_softmax) {
  const int64_t tokens = groups * group_tokens;
  what = "gate, " + std::to_string(tokens) + " tokens, " + std::to_string(experts) + " experts, top-" + std::to_string(topk);
  auto logits = numbers<float>(tokens * experts);
  for (float& logit : logits) {
    const int64_t kind = pick(0, 15);
    if (kind < 4) logit = std::round(logit);  // ties
    if (kind == 4) logit = -0.0f;
    if (kind == 5) logit = -std::numeric_limits<float>::infinity();
  }
  // One token whose sigmoid scores are less than the smallest number.
  if (tokens > 1)
    for (int64_t e = 0; e < experts; ++e) logits[experts + e] -= 150.0f;
  // One token whose logits are not finite: the first best is a NaN, and all that follows from them is NaN.
  if (tokens > 3) logits[2 * experts + pick(0, experts - 1)] = std::nanf("");
  GateResults cpu(tokens, experts, topk, groups), gpu(tokens, experts, topk, groups);
  const auto forward = [&](GateResults& r) {
    return samoe::cpu::GateForward{logits.data(), tokens, experts, topk, groups, sigmoid, pre_softmax, r.probs.data(), r.ids.data(),
                                   r.counts.data(), r.sums.data(), r.z.data(), r.logsumexp.data(), 1};
  };
  kernels().gate_forward(forward(cpu));
  std::vector<char> workspace(static_cast<size_t>(cuda::gate_workspace_bytes(forward(gpu))));
  cuda::gate_forward(forward(gpu), workspace.data(), kStream);
  expect_equal("ids", gpu.ids, cpu.ids);
  expect_equal("counts", gpu.counts, cpu.counts);
  expect_equal("probs", gpu.probs, cpu.probs);
  expect_equal("score sums", gpu.sums, cpu.sums);
  expect_equal("z", gpu.z, cpu.z);
  expect_equal("logsumexp", gpu.logsumexp, cpu.logsumexp);
  const auto dprobs = numbers<float>(tokens * topk), dsums = numbers<float>(groups * experts), dz = numbers<float>(1);
  for (int given = tokens > 100 ? 7 : 0; given < 8; ++given) {  // which gradients arrive
    const auto backward = [&](std::vector<float>& gradient) {
      return samoe::cpu::GateBackward{logits.data(), cpu.logsumexp.data(), cpu.probs.data(), cpu.ids.data(),
                                      given & 1 ? dprobs.data() : nullptr, given & 2 ? dsums.data() : nullptr,
                                      given & 4 ? dz.data() : nullptr, tokens, experts, topk, groups, sigmoid, pre_softmax,
                                      gradient.data(), 1};
    };
    kernels().gate_backward(backward(cpu.gradient));
    cuda::gate_backward(backward(gpu.gradient), kStream);
    expect_equal("logits' gradient", gpu.gradient, cpu.gradient, 1e-4);
  }
}

// ids: how slots choose experts.
enum class Choice { any, one_expert, few, dropped };

std::vector<int64_t> choose(int64_t slots, int64_t experts, Choice choice) {
  std::vector<int64_t> ids(static_cast<size_t>(slots));
  for (int64_t& id : ids) {
    id = choice == Choice::any ? pick(-1, experts - 1) : (choice == Choice::few ? pick(0, experts / 4) : experts - 1);
    if (choice == Choice::dropped) id = -1;
  }
  return ids;
}

struct Sorted {
  std::vector<int64_t> slot_of_row, row_of_slot, counts;
};

Sorted check_sort(int64_t slots, int64_t experts, Choice choice) {
  what = "sort of " + std::to_string(slots) + " slots to " + std::to_string(experts) + " experts";
  const auto ids = choose(slots, experts, choice);
  std::vector<int64_t> cursor(experts);
  Sorted cpu{{}, zeros<int64_t>(slots), zeros<int64_t>(experts)}, gpu = cpu;
  int64_t bad = 0;
  const int64_t rows = samoe::cpu::count_slots(ids.data(), slots, experts, 1, cpu.counts.data(), cursor.data(), &bad, 1);
  cpu.slot_of_row.resize(rows), gpu.slot_of_row.resize(slots);
  samoe::cpu::place_slots(ids.data(), slots, experts, 1, cursor.data(), cpu.slot_of_row.data(), cpu.row_of_slot.data(), 1);
  std::vector<int64_t> cursors(cuda::num_slot_chunks(slots) * (experts + 1), -7);
  std::vector<int32_t> ends(static_cast<size_t>(experts), -7);
  cuda::count_slots(ids.data(), slots, experts, gpu.counts.data(), ends.data(), cursors.data(), kStream);
  cuda::place_slots(ids.data(), slots, experts, cursors.data(), gpu.slot_of_row.data(), gpu.row_of_slot.data(), kStream);
  std::vector<int64_t> all = cpu.slot_of_row;  // and dropped slots after the others
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (ids[static_cast<size_t>(slot)] < 0) all.push_back(slot);
  }
  expect_equal("counts", gpu.counts, cpu.counts);
  std::vector<int64_t> expected(cpu.counts.size());
  std::partial_sum(cpu.counts.begin(), cpu.counts.end(), expected.begin());
  expected.back() = slots;
  expect_equal("ends", std::vector<int64_t>(ends.begin(), ends.end()), expected);
  expect_equal("slot of row", gpu.slot_of_row, all);
  expect_equal("row of slot", gpu.row_of_slot, cpu.row_of_slot);
  return cpu;
}

template <typename T>
void check_rows(int64_t tokens, int64_t topk, int64_t hidden, Choice choice) {
  const Sorted s = check_sort(tokens * topk, 9, choice);
  what = "rows, " + std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden);
  const int64_t rows = static_cast<int64_t>(s.slot_of_row.size()), row_bytes = hidden * static_cast<int64_t>(sizeof(T));
  const auto x = numbers<T>(tokens * hidden), moved = numbers<T>(rows * hidden);
  const auto probs = numbers<float>(tokens * topk);
  std::vector<T> cpu = zeros<T>(rows * hidden), gpu = cpu;
  const auto gather = [&](std::vector<T>& out) {
    return samoe::cpu::GatherRows{reinterpret_cast<const char*>(x.data()), s.slot_of_row.data(), rows, topk, row_bytes,
                                  reinterpret_cast<char*>(out.data()), 1};
  };
  kernels().gather_rows(gather(cpu));
  cuda::gather_rows(gather(gpu), tokens, kStream);
  expect_equal("gathered", gpu, cpu);
  for (const float* weights : {probs.data(), static_cast<const float*>(nullptr)}) {
    std::vector<T> y_cpu = zeros<T>(tokens * hidden), y_gpu = numbers<T>(tokens * hidden);
    const auto unpermute = [&](std::vector<T>& y) {
      return samoe::cpu::Unpermute{dtype_of<T>(), moved.data(), weights, s.row_of_slot.data(), tokens, topk, hidden, y.data(), 1};
    };
    kernels().unpermute(unpermute(y_cpu));
    cuda::unpermute(unpermute(y_gpu), rows, kStream);
    expect_equal("sum of rows", y_gpu, y_cpu);
  }
  // A device may have rows of dropped slots after the others: they get no gradient.
  std::vector<int64_t> slot_of_row = s.slot_of_row;
  for (int64_t slot = 0; slot < tokens * topk; ++slot) {
    if (s.row_of_slot[static_cast<size_t>(slot)] < 0) slot_of_row.push_back(slot);
  }
  std::vector<float> dprobs_cpu(probs.size()), dprobs_gpu(probs.size(), 7.0f);
  const auto backward = [&](std::vector<T>& drows, std::vector<float>& dprobs) {
    return samoe::cpu::UnpermuteBackward{dtype_of<T>(), x.data(), moved.data(), probs.data(), slot_of_row.data(),
                                         s.row_of_slot.data(), tokens, topk, hidden, drows.data(), dprobs.data(), 1};
  };
  kernels().unpermute_backward(backward(cpu, dprobs_cpu));
  cuda::unpermute_backward(backward(gpu, dprobs_gpu), rows, kStream);
  expect_equal("rows' gradient", gpu, cpu);
  expect_equal("probabilities' gradient", dprobs_gpu, dprobs_cpu, 1e-4);
  cpu.resize(static_cast<size_t>(tokens * topk * hidden)), gpu = numbers<T>(tokens * topk * hidden);
  cuda::unpermute_backward(backward(gpu, dprobs_gpu), tokens * topk, kStream);
  expect_equal("gradient of rows of dropped slots", gpu, cpu);
}

template <typename T>
void check_combine(int64_t layers, int64_t groups, int64_t banks, int64_t n) {
  what = "combination, " + std::to_string(layers) + " layers, " + std::to_string(banks) + " banks of " + std::to_string(n);
  auto a = numbers<float>(layers * groups * banks);
  for (float& value : a) value = pick(0, 2) == 0 ? 0.0f : value;
  auto t = numbers<float>(banks * groups * n);
  // A bank whose coefficient is 0 may hold anything: only the first layer sees this NaN.
  if (banks > 1) {
    for (int64_t i = 0; i < layers * groups; ++i) a[i * banks + 1] = i == 0 ? 0.5f : 0.0f;
    if (n > 0) t[groups * n] = std::nanf("");
  }
  std::vector<T> w_cpu = zeros<T>(layers * groups * n), w_gpu = numbers<T>(layers * groups * n);
  const auto forward = [&](std::vector<T>& w) {
    const int64_t size = sizeof(T);
    return samoe::cpu::Combine{a.data(), {t.data(), groups * n, n}, dtype_of<T>(),
                               {reinterpret_cast<char*>(w.data()), groups * n * size, n * size}, layers, groups, banks, n, 1};
  };
  kernels().combine(forward(w_cpu));
  cuda::combine(forward(w_gpu), kStream);
  expect_equal("weights", w_gpu, w_cpu);
  const auto dw = numbers<float>(layers * groups * n);
  if (banks > 1 && n > 0) t[groups * n] = 1.0f;
  std::vector<float> dt_cpu = numbers<float>(banks * groups * n), dt_gpu = dt_cpu;
  std::vector<float> da_cpu(a.size()), da_gpu(a.size(), 7.0f);
  const auto backward = [&](std::vector<float>& dt, std::vector<float>& da) {
    return samoe::cpu::CombineBackward{a.data(), {t.data(), groups * n, n}, {dw.data(), groups * n, n}, {dt.data(), groups * n, n},
                                       da.data(), layers, groups, banks, n, 1};
  };
  kernels().combine_backward(backward(dt_cpu, da_cpu));
  std::vector<char> workspace(static_cast<size_t>(cuda::combine_backward_workspace_bytes(backward(dt_gpu, da_gpu))));
  cuda::combine_backward(backward(dt_gpu, da_gpu), workspace.data(), kStream);
  expect_equal("banks' gradient", dt_gpu, dt_cpu);
  expect_equal("coefficients' gradient", da_gpu, da_cpu, 1e-4);
}

template <typename T>
void check_swiglu(int64_t rows, int64_t width) {
  what = "SwiGLU, " + std::to_string(rows) + " rows of " + std::to_string(width);
  auto h = numbers<T>(rows * width * 2);
  if (h.size() > 9) h[3] = static_cast<T>(sizeof(T) == 4 ? -200 : 0xc348), h[5] = static_cast<T>(sizeof(T) == 4 ? 200 : 0x4348);
  const auto da = numbers<T>(rows * width);
  std::vector<T> a_cpu = zeros<T>(rows * width), a_gpu = numbers<T>(rows * width), dh_cpu = zeros<T>(rows * width * 2), dh_gpu = dh_cpu;
  constexpr DType kType = dtype_of<T>();
  kernels().activate({kType, kType, h.data(), nullptr, rows, width, true, nullptr, a_cpu.data()});
  cuda::swiglu({kType, kType, h.data(), nullptr, rows, width, true, nullptr, a_gpu.data()}, kStream);
  expect_equal("activation", a_gpu, a_cpu);
  const auto backward = [&](std::vector<T>& a, std::vector<T>& dh) {
    return samoe::cpu::ActivateBackward{kType, kType, h.data(), nullptr, da.data(), rows, width, true, a.data(), dh.data()};
  };
  kernels().activate_backward(backward(a_cpu, dh_cpu));
  a_gpu = numbers<T>(rows * width);
  cuda::swiglu_backward(backward(a_gpu, dh_gpu), kStream);
  expect_equal("activation again", a_gpu, a_cpu);
  expect_equal("gradient", dh_gpu, dh_cpu, sizeof(T) == 4 ? 2e-5 : 1.6e-2);
}

void expect(bool holds, const char* name) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", what.c_str(), name);
  std::exit(1);
}

// What a launch that is refused, a kernel that stops, and an error that another left in the thread are told as.
void check_launch_errors() {
  what = "errors of launches";
  namespace emulation = samoe::emulation;
  const float from[4] = {1, 2, 3, 4};
  float to[4] = {};
  int64_t index = 1;
  const auto gather = [&] {
    cuda::gather_rows({reinterpret_cast<const char*>(from), &index, 1, 1, 8, reinterpret_cast<char*>(to), 1}, 2, kStream);
    return cuda::launch_error();
  };
  emulation::last_error = cudaErrorNotReady;
  expect(gather().text == nullptr && to[0] == 3, "an error of others is taken for one of this launch");
  expect(cudaGetLastError() == cudaErrorNotReady, "an error of others is taken away");
  emulation::refusal = cudaErrorInvalidConfiguration;
  const cuda::LaunchError refused = gather();
  expect(refused.text != nullptr && !refused.is_of_kernel_run, "a launch that is refused");
  for (index = -1; index < 4; index += 3) {
    const cuda::LaunchError stopped = gather();
    expect(stopped.text != nullptr && stopped.is_of_kernel_run, "a kernel that stops at a wrong index");
  }
  index = 0;
  expect(gather().text == nullptr && to[0] == 1 && cudaGetLastError() == cudaSuccess, "an error stays when it was told");
}

}  // namespace

int main(int argc, char** argv) {
  check_launch_errors();
  const int64_t many = argc > 1 ? std::atoll(argv[1]) : 513;
  for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{7}, many}) {
    for (const int64_t topk : {1, 2, 8}) {
      for (const int flavour : {0, 1, 2, 3}) check_gate(1, tokens, tokens == 7 ? 70 : 8, topk, flavour & 1, flavour & 2);
      for (const Choice choice : {Choice::any, Choice::one_expert, Choice::few, Choice::dropped}) {
        check_sort(tokens * topk, 9, choice);
        if (tokens == many && topk == 8 && choice != Choice::any) continue;
        const int64_t hidden = tokens == many ? (topk == 2 ? 64 : 21) : (topk == 8 ? 7 : 272);
        check_rows<float>(tokens, topk, hidden, choice);
        check_rows<uint16_t>(tokens, topk, hidden, choice);
      }
    }
  }
  check_gate(3, 37, 300, 8, false, true);
  check_gate(2, 9, 65, 40, true, false);
  check_sort(9000, 300, Choice::any);
  check_sort(270000, 3, Choice::any);  // more than 256 slots for each of the most chunks
  for (const int64_t n : {0, 1, 7, 512, 513, 9001}) {
    check_combine<float>(5, 2, 3, n);
    check_combine<uint16_t>(12, 1, 4, n);
  }
  check_combine<float>(1, 3, 1, 4098);
  check_combine<float>(21, 2, 9, 260);
  check_combine<uint16_t>(8, 2, 19, 77);
  for (const int64_t width : {1, 7, 24, 256}) {
    for (const int64_t rows : {0, 1, 37}) check_swiglu<float>(rows, width), check_swiglu<uint16_t>(rows, width);
  }
  std::printf("the CUDA kernels, emulated, agree with the CPU's (%s)\n", kernels().instruction_set);
  return 0;
}
