// A program without torch that runs the CPU kernels over random shapes, for the sanitizers (tools/sanitize.sh). Buffers
// have their exact size on the heap, so that a step outside is seen; values are compared with plain loops. Prints what it
// ran; ends with status 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../kernels/kernels.h"
#include "../../kernels/mlp.h"
#include "checks.h"

namespace {

using samoe::DType;
using samoe::expect;
using samoe::floats;
using samoe::near;
using samoe::pick;
using samoe::value_of;
using samoe::cpu::kernels;

uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void check_gate() {
  const int64_t groups = pick(1, 3), tokens = groups * pick(0, 90), experts = pick(1, 70);
  const int64_t topk = pick(1, experts < 9 ? experts : 9);
  const bool sigmoid = pick(0, 1) == 1, pre_softmax = pick(0, 1) == 1;
  const auto logits = floats(tokens * experts);
  std::vector<float> probs(tokens * topk), sums(groups * experts), logsumexp(tokens), gradient(tokens * experts);
  std::vector<int64_t> ids(tokens * topk), counts(groups * experts);
  float z = 0;
  kernels().gate_forward({logits.data(), tokens, experts, topk, groups, sigmoid, pre_softmax, probs.data(), ids.data(),
                          counts.data(), sums.data(), &z, logsumexp.data(), 2});
  double expected_z = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    double sum = 0;
    int64_t best = 0;
    for (int64_t e = 0; e < experts; ++e) {
      sum += std::exp(static_cast<double>(logits[t * experts + e]));
      if (logits[t * experts + e] > logits[t * experts + best]) best = e;
    }
    expect(ids[t * topk] == best, "best expert");
    expect(near(logsumexp[t], std::log(sum), 1e-5), "logsumexp");
    expected_z += std::log(sum) * std::log(sum);
  }
  expect(near(z, expected_z, 1e-5), "z");
  int64_t routed = 0;
  for (const int64_t count : counts) routed += count;
  expect(routed == tokens * topk, "counts");
  const auto dprobs = floats(tokens * topk), dsums = floats(groups * experts);
  const float dz = 0.1f;
  kernels().gate_backward({logits.data(), logsumexp.data(), probs.data(), ids.data(), dprobs.data(), dsums.data(), &dz,
                           tokens, experts, topk, groups, sigmoid, pre_softmax, gradient.data(), 2});
  for (const float value : gradient) expect(std::isfinite(value), "gate gradient");
}

template <typename T>
void check_rows(DType dtype) {
  const int64_t tokens = pick(0, 60), topk = pick(1, 5), experts = pick(1, 9), hidden = pick(1, 150);
  std::vector<int64_t> ids(tokens * topk), counts(experts), row_of_slot(tokens * topk);
  for (int64_t& id : ids) id = pick(-1, experts - 1);
  const int64_t chunks = pick(1, 4);
  std::vector<int64_t> cursor(chunks * experts);
  int64_t bad = 0;
  const int64_t rows = samoe::cpu::count_slots(ids.data(), tokens * topk, experts, chunks, counts.data(), cursor.data(),
                                               &bad, static_cast<int>(chunks));
  std::vector<int64_t> slot_of_row(rows);
  samoe::cpu::place_slots(ids.data(), tokens * topk, experts, chunks, cursor.data(), slot_of_row.data(),
                          row_of_slot.data(), static_cast<int>(chunks));
  for (int64_t row = 1; row < rows; ++row) {
    const int64_t before = slot_of_row[row - 1], here = slot_of_row[row];
    expect(ids[before] < ids[here] || (ids[before] == ids[here] && before < here), "order of rows");
  }
  std::vector<T> x(tokens * hidden), moved(rows * hidden), y(tokens * hidden), drows(rows * hidden);
  for (T& value : x) value = static_cast<T>(pick(0, 15000));
  kernels().gather_rows({reinterpret_cast<const char*>(x.data()), slot_of_row.data(), rows, topk,
                         hidden * static_cast<int64_t>(sizeof(T)), reinterpret_cast<char*>(moved.data()), 2});
  for (int64_t row = 0; row < rows; ++row) {
    expect(std::memcmp(&moved[row * hidden], &x[slot_of_row[row] / topk * hidden], hidden * sizeof(T)) == 0, "gather");
  }
  const std::vector<float> probs(tokens * topk, 1.0f);
  std::vector<float> dprobs(tokens * topk, -1.0f);
  kernels().unpermute({dtype, moved.data(), probs.data(), row_of_slot.data(), tokens, topk, hidden, y.data(), 2});
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t kept = 0;
    for (int64_t k = 0; k < topk; ++k) kept += row_of_slot[t * topk + k] >= 0;
    if (kept == 1) expect(std::memcmp(&y[t * hidden], &x[t * hidden], hidden * sizeof(T)) == 0, "unpermute of one row");
  }
  kernels().unpermute_backward({dtype, x.data(), moved.data(), probs.data(), slot_of_row.data(), row_of_slot.data(),
                                tokens, topk, hidden, drows.data(), dprobs.data(), 2});
  expect(rows == 0 || std::memcmp(drows.data(), moved.data(), rows * hidden * sizeof(T)) == 0, "unpermute backward");
  for (int64_t slot = 0; slot < tokens * topk; ++slot) expect(row_of_slot[slot] >= 0 || dprobs[slot] == 0, "dropped");
}

void check_combine() {
  const int64_t layers = pick(1, 6), groups = pick(1, 3), banks = pick(1, 19), n = pick(0, 2300);
  auto a = floats(layers * groups * banks);
  for (float& value : a) value = pick(0, 3) == 0 ? 0.0f : value;
  const auto t = floats(banks * groups * n), dw = floats(layers * groups * n);
  std::vector<float> w(layers * groups * n), dt(banks * groups * n, 0.0f), da(layers * groups * banks);
  std::vector<uint16_t> w16(layers * groups * n);
  kernels().combine({a.data(),
                     {t.data(), groups * n, n},
                     DType::f32,
                     {reinterpret_cast<char*>(w.data()), groups * n * 4, n * 4},
                     layers,
                     groups,
                     banks,
                     n,
                     2});
  kernels().combine({a.data(),
                     {t.data(), groups * n, n},
                     DType::bf16,
                     {reinterpret_cast<char*>(w16.data()), groups * n * 2, n * 2},
                     layers,
                     groups,
                     banks,
                     n,
                     2});
  kernels().combine_backward({a.data(),
                              {t.data(), groups * n, n},
                              {dw.data(), groups * n, n},
                              {dt.data(), groups * n, n},
                              da.data(),
                              layers,
                              groups,
                              banks,
                              n,
                              2});
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t j = 0; j < n; j += 37) {
        double expected = 0;
        for (int64_t p = 0; p < banks; ++p)
          expected += static_cast<double>(a[(l * groups + g) * banks + p]) * t[(p * groups + g) * n + j];
        expect(near(w[(l * groups + g) * n + j], expected, 1e-5), "combine");
        expect(near(value_of(w16[(l * groups + g) * n + j]), expected, 1e-2), "combine to bf16");
      }
      for (int64_t p = 0; p < banks; ++p) {
        double expected = 0;
        for (int64_t j = 0; j < n; ++j)
          expected += static_cast<double>(dw[(l * groups + g) * n + j]) * t[(p * groups + g) * n + j];
        expect(near(da[(l * groups + g) * banks + p], expected, 1e-4), "coefficient gradient");
      }
    }
  }
}

void check_cross_entropy() {
  const int64_t tokens = pick(0, 9), width = pick(0, 300), first_id = pick(0, 20);
  const auto logits = floats(tokens * width), dloss = floats(tokens);
  std::vector<float> peak(tokens), sum(tokens), target(tokens), logsumexp(tokens), gradient(tokens * width);
  std::vector<int64_t> labels(tokens);
  for (int64_t& label : labels) label = pick(0, first_id + width + 5);
  kernels().cross_entropy_forward(
      {DType::f32, logits.data(), labels.data(), tokens, width, first_id, peak.data(), sum.data(), target.data(), 2});
  for (int64_t t = 0; t < tokens; ++t) {
    double expected = 0;
    for (int64_t v = 0; v < width; ++v) expected += std::exp(static_cast<double>(logits[t * width + v]) - peak[t]);
    expect(near(sum[t], expected, 1e-5), "sum of exponentials");
    logsumexp[t] = peak[t] + std::log(sum[t]);
  }
  kernels().cross_entropy_backward({DType::f32, logits.data(), labels.data(), logsumexp.data(), dloss.data(), tokens,
                                    width, first_id, gradient.data(), 2});
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < width; ++v) {
      const double p = std::exp(static_cast<double>(logits[t * width + v]) - logsumexp[t]);
      const double expected = (p - (labels[t] - first_id == v ? 1.0 : 0.0)) * dloss[t];
      expect(near(gradient[t * width + v], expected, 1e-5), "logits' gradient");
    }
  }
}

// Small whole numbers: sums in fp32 are exact, whatever their order.
std::vector<uint16_t> whole_numbers(int64_t n) {
  std::vector<uint16_t> values(static_cast<size_t>(n));
  for (uint16_t& value : values) value = bf16_bits(static_cast<float>(pick(-3, 3)));
  return values;
}

void check_bf16_product(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed, bool adds) {
  if (!kernels().has_bf16_product()) return;
  const auto a = whole_numbers(m * k), b = whole_numbers(k * n);
  const auto bias = floats(n);
  std::vector<uint16_t> out(static_cast<size_t>(m * n));
  std::vector<float> sum(static_cast<size_t>(m * n), 1.0f);
  const samoe::cpu::Bf16Product product = {
      a.data(), a_transposed ? m : k, a_transposed, b.data(), b_transposed ? k : n, b_transposed, m, n, k,
      adds ? nullptr : bias.data(), adds ? nullptr : out.data(), adds ? sum.data() : nullptr, n};
  std::vector<char> work(static_cast<size_t>(kernels().bf16_product_workspace_bytes(product)));
  kernels().bf16_product(product, work.data());
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float expected = 0;
      for (int64_t l = 0; l < k; ++l) {
        expected += value_of(a[a_transposed ? l * m + i : i * k + l]) * value_of(b[b_transposed ? j * k + l : l * n + j]);
      }
      const auto at = static_cast<size_t>(i * n + j);
      expect(adds ? sum[at] == 1.0f + expected : out[at] == bf16_bits(expected + bias[j]), "bf16 product");
    }
  }
}

void check_bf16_products() {
  for (int form = 0; form < 8; ++form) {
    const bool a_transposed = (form & 1) != 0, b_transposed = (form & 2) != 0, adds = (form & 4) != 0;
    check_bf16_product(pick(1, 40), pick(1, 120), pick(1, 70), a_transposed, b_transposed, adds);
    check_bf16_product(pick(60, 70), pick(1, 20), pick(1, 40), a_transposed, b_transposed, adds);
  }
}

}  // namespace

int main() {
  for (int round = 0; round < 60; ++round) {
    check_gate();
    check_rows<float>(DType::f32);
    check_rows<uint16_t>(DType::bf16);
    check_combine();
    check_cross_entropy();
    check_bf16_products();
  }
  // Longer than one run of a sum.
  check_bf16_product(9, 50, 4101, true, false, true);
  check_bf16_product(9, 50, 4101, false, true, false);
  std::printf("60 rounds of every kernel agree (%s)\n", kernels().instruction_set);
  return 0;
}
