// Products of few rows of x with rows of weights that are read one after another, or two side by side, as one stream.
//
// A step of one or a few sequences waits for its weights. Measured on a Zen 5, a thread that reads four rows side by side gets
// 0.5 to 0.8 of what it gets from one, and a check per line of what to ask for costs a tenth: a stream asks piece by piece, into
// the cache that `caches` says.
#pragma once

#include "decode_tile.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

// Rows of x that a stream takes.
template <typename W>
constexpr int64_t stream_rows(bool by_digits) {
  if (by_digits || sizeof(W) == 1) return 1;
  return sizeof(W) == 2 ? kStreamRows : 2;
}

// Rows of w that a stream reads side by side: two hide how long a sum waits for itself. With wide vectors one row of x, or
// two, needs one: the sums of a row of w begin while those of the row before it end.
constexpr int64_t stream_side(int64_t num_rows) { return kLanes == 16 && num_rows <= 2 ? 1 : 2; }

// Keeps a value in a register: compilers load or widen it again for each of its products, more than the processor can load, and
// contract a product with the sum that follows.
SAMOE_ALWAYS void hold([[maybe_unused]] vf& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX2__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// acc[m][r] += the products of a step over k with R rows of w: a vector of weights, or the `left` that a row still has.
template <int M, int R, typename W>
SAMOE_ALWAYS void add_products(const float* const* rows, const W* const* w, int64_t k, int64_t left, vf (*acc)[R]) {
  vf weight[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    weight[r] = load_part(w[r] + k, left);
    hold(weight[r]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    vf row = load_part(rows[m] + k, left);
    if constexpr (R > 1) hold(row);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) acc[m][r] = fused(row, weight[r], acc[m][r]);
  }
}

// acc[m][r] += the products with one half of packed rows' pairs of vectors.
template <int M, int R>
SAMOE_ALWAYS void add_halves(const float* const* rows, int64_t k, vf* weight, vf (*acc)[R]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    vf row = load(rows[m] + k);
    if constexpr (R > 1) hold(row);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) acc[m][r] = fused(row, weight[r], acc[m][r]);
  }
}

// The same for bf16: x is packed, the even elements of 2 kLanes before the odd ones.
template <int M, int R>
SAMOE_ALWAYS void add_products(const float* const* rows, const uint16_t* const* w, int64_t k, int64_t left, vf (*acc)[R]) {
  vf pair[R], weight[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    pair[r] = (vf)load_pairs(w[r] + k, left);
    hold(pair[r]);
    weight[r] = (vf)((vu)pair[r] << 16);
    if constexpr (M > 1) hold(weight[r]);
  }
  add_halves<M, R>(rows, k, weight, acc);
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    weight[r] = (vf)((vu)pair[r] & 0xffff0000u);
    if constexpr (M > 1) hold(weight[r]);
  }
  add_halves<M, R>(rows, k + kLanes, weight, acc);
}

// sums[m] = x[m] . w[n], n = 0 .. 3, for few rows of x and 4 rows of w, of which R are read side by side.
template <Reading kReading, int M, int R, typename W>
SAMOE_INLINE void stream(const char* const* x, const W* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  constexpr int64_t kSize = sizeof(W), kStep = kSize == 2 ? 2 * kLanes : kLanes, kPiece = kPieceBytes / kSize;
  vf folded[M][kTileOuts];
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = reinterpret_cast<const float*>(x[m]);
  Ahead wanted = ahead;
#pragma GCC unroll 1
  for (int n = 0; n < kTileOuts; n += R) {
    vf acc[M][R] = {};
    for (int64_t begin = 0; begin < inputs; begin += kPiece) {
      const int64_t end = inputs - begin < kPiece ? inputs : begin + kPiece, full = end - (end - begin) % kStep;
      Asked asked = wanted.take<kReading>(R * (end - begin) * kSize, w[n] + begin);
      int64_t k = begin;
      for (; k < full; k += kStep) {
        if (kStep * kSize >= kLineBytes || (k - begin) * kSize % kLineBytes == 0) {
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) ask_for_line<kReading>(asked);
        }
        add_products<M, R>(rows, w + n, k, kStep, acc);
      }
      if (k < end) add_products<M, R>(rows, w + n, k, end - k, acc);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) folded[m][n + r] = acc[m][r];
  }
  ahead = wanted;
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sums[m] = sum_of_four(folded[m][0], folded[m][1], folded[m][2], folded[m][3]);
}

#if defined(__AVX512F__)
// The same for int8 weights by one row of digits, row after row of w.
template <Reading kReading>
SAMOE_VNNI static void digit_stream(const char* x, const int8_t* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  const __m512i offset = _mm512_set1_epi8(-128);
  vf whole[kTileOuts];
  Ahead wanted = ahead;
  for (int n = 0; n < kTileOuts; ++n) {
    __m512i sum[3];
#pragma GCC unroll 3
    for (int d = 0; d < 3; ++d) sum[d] = _mm512_loadu_si512(x + 64 * (d + 1));
    Asked asked{nullptr, nullptr};
    for (int64_t k = 0; k < inputs; k += kLineBytes) {
      const int64_t left = inputs - k;
      if (k % kPieceBytes == 0) asked = wanted.take<kReading>(left < kPieceBytes ? left : kPieceBytes, w[n] + k);
      ask_for_line<kReading>(asked);
      const __m512i bytes = left >= kLineBytes ? _mm512_loadu_si512(w[n] + k)
                                               : _mm512_maskz_loadu_epi8((1ull << left) - 1, w[n] + k);
      const __m512i weight = _mm512_xor_si512(bytes, offset);
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) sum[d] = _mm512_dpbusd_epi32(sum[d], weight, _mm512_loadu_si512(x + 256 + 3 * k + 64 * d));
    }
    whole[n] = fused((vf)_mm512_cvtepi32_ps(sum[2]), splat(65536.0f),
                     fused((vf)_mm512_cvtepi32_ps(sum[1]), splat(256.0f), (vf)_mm512_cvtepi32_ps(sum[0])));
  }
  ahead = wanted;
  float unit;
  memcpy(&unit, x, sizeof unit);
  sums[0] = sum_of_four(whole[0], whole[1], whole[2], whole[3]) * unit;
}
#endif

template <Reading kReading, typename W>
static __attribute__((noinline)) void stream_of(int64_t num_rows, const char* const* x, const W* const* w, int64_t inputs,
                                                Ahead& ahead, v4* sums) {
  if (num_rows == 1) return stream<kReading, 1, stream_side(1)>(x, w, inputs, ahead, sums);
  if (num_rows == 2) return stream<kReading, 2, stream_side(2)>(x, w, inputs, ahead, sums);
  if constexpr (sizeof(W) == 2) {
    if (num_rows == 3) return stream<kReading, 3, stream_side(3)>(x, w, inputs, ahead, sums);
    stream<kReading, 4, stream_side(4)>(x, w, inputs, ahead, sums);
  }
}

// Up to kTileRows rows of x by 4 rows of w.
template <typename W>
SAMOE_INLINE void multiply_rows(int64_t num_rows, const char* const* x, const W* const* w, int64_t inputs, Ahead& ahead,
                                Reading reading, bool, v4* sums) {
  switch (reading) {
    case Reading::tiles: return tile_of(num_rows, x, w, inputs, ahead, sums);
    case Reading::first_cache: return stream_of<Reading::first_cache>(num_rows, x, w, inputs, ahead, sums);
    case Reading::second_cache: return stream_of<Reading::second_cache>(num_rows, x, w, inputs, ahead, sums);
    case Reading::pages_in_turn: return stream_of<Reading::pages_in_turn>(num_rows, x, w, inputs, ahead, sums);
  }
}
#if defined(__AVX512F__)
SAMOE_INLINE void multiply_rows(int64_t num_rows, const char* const* x, const int8_t* const* w, int64_t inputs,
                                Ahead& ahead, Reading reading, bool by_digits, v4* sums) {
  if (!by_digits) return multiply_rows<int8_t>(num_rows, x, w, inputs, ahead, reading, by_digits, sums);
  if (reading == Reading::first_cache) return digit_stream<Reading::first_cache>(x[0], w, inputs, ahead, sums);
  if (reading == Reading::second_cache) return digit_stream<Reading::second_cache>(x[0], w, inputs, ahead, sums);
  if (reading == Reading::pages_in_turn) return digit_stream<Reading::pages_in_turn>(x[0], w, inputs, ahead, sums);
  if (num_rows == 1) return digit_tile<1>(x, w, inputs, ahead, sums);
  digit_tile<2>(x, w, inputs, ahead, sums);
}
#endif

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
