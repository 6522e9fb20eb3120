// Activations and their gradients of bf16 rows, on CPUs with AVX-512's bf16 instructions.
//
// The sigmoid is good to 2^-13, while rounding to bf16 is off by up to 2^-8: a third of the instructions of
// activation.cpp.
#include "bf16_vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

#if defined(__AVX512F__)

namespace {

SAMOE_BF16 inline __m512 all(float value) { return _mm512_set1_ps(value); }

// sigmoid(z) and 1 - sigmoid(z) for x = -z log2(e): both keep their relative accuracy, and vanish far out.
struct Sigmoid {
  __m512 value, rest;
};
SAMOE_BF16 inline Sigmoid sigmoid(__m512 x) {
  // 2^x with x = n + r, |r| <= 1/2: a polynomial in r, off by 3e-6 at most. Infinities are held back; NaN stays.
  const __m512 held = _mm512_min_ps(all(126.0f), _mm512_max_ps(all(-200.0f), x));
  const __m512 n = _mm512_roundscale_ps(held, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(held, n);
  __m512 y = _mm512_fmadd_ps(all(0.009582853f), r, all(0.055906426f));
  y = _mm512_fmadd_ps(y, r, all(0.240240991f));
  y = _mm512_fmadd_ps(y, r, all(0.693124175f));
  y = _mm512_fmadd_ps(y, r, all(1.0f));
  const __m512 power = _mm512_scalef_ps(y, n);
  const __mmask16 inside = _mm512_cmp_ps_mask(x, all(126.0f), _CMP_NGT_UQ);
  const __m512 value = _mm512_maskz_rcp14_ps(inside, _mm512_add_ps(all(1.0f), power));
  return {value, _mm512_mul_ps(power, value)};
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kTwiceRoot2OverPi = 1.5957691216057308f;
constexpr float kCube = 0.044715f;

// gelu(h) = h sigmoid(u) with u = 2 sqrt(2 / pi) (h + 0.044715 h^3).
SAMOE_BF16 inline Sigmoid gelu_sigmoid(__m512 h, __m512 square) {
  constexpr float kScale = -kLog2E * kTwiceRoot2OverPi;
  const __m512 factor = _mm512_fmadd_ps(square, all(kScale * kCube), all(kScale));
  return sigmoid(_mm512_mul_ps(h, factor));
}

SAMOE_BF16 inline __m512 hidden(const uint16_t* h, const float* bias, __mmask16 mask) {
  const __m512 value = load16(h, mask);
  return bias == nullptr ? value : _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias));
}

}  // namespace

SAMOE_BF16 void bf16_activate(const Activate& a) {
  const int64_t up = a.gated ? 2 * a.width : a.width;
  for (int64_t r = 0; r < a.num_rows; ++r) {
    const uint16_t* h = static_cast<const uint16_t*>(a.h_nU) + r * up;
    uint16_t* out = static_cast<uint16_t*>(a.a_nF) + r * a.width;
    for (int64_t f = 0; f < a.width; f += 16) {
      const __mmask16 mask = first16(a.width - f);
      const float* bias = a.bias_U == nullptr ? nullptr : a.bias_U + f;
      const __m512 first = hidden(h + f, bias, mask);
      if (!a.gated) {
        store16(out + f, _mm512_mul_ps(first, gelu_sigmoid(first, _mm512_mul_ps(first, first)).value), mask);
        continue;
      }
      const __m512 second = hidden(h + a.width + f, bias == nullptr ? nullptr : bias + a.width, mask);
      const __m512 silu = _mm512_mul_ps(first, sigmoid(_mm512_mul_ps(first, all(-kLog2E))).value);
      store16(out + f, _mm512_mul_ps(silu, second), mask);
    }
  }
}

SAMOE_BF16 void bf16_activate_backward(const ActivateBackward& b) {
  const int64_t up = b.gated ? 2 * b.width : b.width;
  for (int64_t r = 0; r < b.num_rows; ++r) {
    const uint16_t* h = static_cast<const uint16_t*>(b.h_nU) + r * up;
    const uint16_t* da = static_cast<const uint16_t*>(b.da_nF) + r * b.width;
    uint16_t* a = static_cast<uint16_t*>(b.a_nF) + r * b.width;
    uint16_t* dh = static_cast<uint16_t*>(b.dh_nU) + r * up;
    for (int64_t f = 0; f < b.width; f += 16) {
      const __mmask16 mask = first16(b.width - f);
      const float* bias = b.bias_U == nullptr ? nullptr : b.bias_U + f;
      const __m512 first = hidden(h + f, bias, mask), gradient = load16(da + f, mask);
      if (!b.gated) {
        const __m512 square = _mm512_mul_ps(first, first);
        const Sigmoid s = gelu_sigmoid(first, square);
        const __m512 value = _mm512_mul_ps(first, s.value);
        const __m512 slope = _mm512_fmadd_ps(square, all(3.0f * kCube * kTwiceRoot2OverPi), all(kTwiceRoot2OverPi));
        store16(a + f, value, mask);
        const __m512 derivative = _mm512_fmadd_ps(_mm512_mul_ps(value, s.rest), slope, s.value);
        store16(dh + f, _mm512_mul_ps(gradient, derivative), mask);
        continue;
      }
      const __m512 second = hidden(h + b.width + f, bias == nullptr ? nullptr : bias + b.width, mask);
      const Sigmoid s = sigmoid(_mm512_mul_ps(first, all(-kLog2E)));
      const __m512 silu = _mm512_mul_ps(first, s.value);
      store16(a + f, _mm512_mul_ps(silu, second), mask);
      const __m512 derivative = _mm512_fmadd_ps(silu, s.rest, s.value);
      store16(dh + f, _mm512_mul_ps(_mm512_mul_ps(gradient, second), derivative), mask);
      store16(dh + b.width + f, _mm512_mul_ps(gradient, silu), mask);
    }
  }
}

#else

void bf16_activate(const Activate&) {}
void bf16_activate_backward(const ActivateBackward&) {}

#endif

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
