// Vectors on CPUs with AVX-512's bf16 instructions, which not all of those have that run the avx512 set: callers ask
// has_bf16_product() first.
#pragma once

#include <cstdint>

#include "../../kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define SAMOE_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#endif

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

bool has_bf16_product();

// activate() and activate_backward() of bf16 tensors, to the accuracy that a bf16 result shows.
void bf16_activate(const Activate&);
void bf16_activate_backward(const ActivateBackward&);

#if defined(__AVX512F__)

SAMOE_BF16 inline __mmask16 first16(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n < 0 ? 0 : n)) - 1);
}

SAMOE_BF16 inline __m512 load16(const uint16_t* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
SAMOE_BF16 inline void store16(uint16_t* p, __m512 v, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

#endif

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
