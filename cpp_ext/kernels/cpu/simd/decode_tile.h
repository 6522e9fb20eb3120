// Products of few rows of x with rows of weights, as they lie: lanes along the summed dim.
//
// One accumulator per (row of x, row of w), filled in the order of k and folded in a fixed tree. So a result does not
// depend on how many rows of x share the call, nor on the order in which a tile's sums are made, and weights need no
// packing: they are used where they were loaded. Rows of x are packed once a call instead, into the form that weights of
// a type are cheapest to multiply with (decode_rows.h).
#pragma once

#include <cstdlib>

#include "decode_rows.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

typedef float v4 __attribute__((vector_size(16)));

#if SAMOE_VECTOR_BYTES == 64
constexpr int kTileRows = 6;  // 24 sums, 6 rows of x and a weight in 32 registers
#elif SAMOE_VECTOR_BYTES == 32
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kPairRows = kTileRows < 4 ? kTileRows : 4;  // for bf16: two registers of a weight
constexpr int kDigitRows = 4;                              // for digits: three sums of a row of w, and four results
constexpr int kTileOuts = 4;
constexpr int64_t kRowBlock = 96;  // rows of x that stay in the second-level cache
constexpr int64_t kTaskOuts = 32;  // rows of w that one task takes
constexpr int64_t kLineBytes = 64;
constexpr int64_t kAheadBytes = 8 << 10;  // at 40 GB/s a thread: what comes in 0.2 us, memory's latency under load

// a * b + c, always contracted or never: left to the compiler, the last bit would depend on the code around it.
SAMOE_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Lanes added up to four.
SAMOE_INLINE v4 fold(vf v) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 x = (__m256)v;
  return (v4)_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#else
  return v;
#endif
}

// The sums of four vectors.
SAMOE_INLINE v4 sum_of_four(vf a, vf b, vf c, vf d) {
  const v4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
#if defined(__x86_64__)
  const __m128 pq = _mm_add_ps(_mm_unpacklo_ps((__m128)p, (__m128)q), _mm_unpackhi_ps((__m128)p, (__m128)q));
  const __m128 rs = _mm_add_ps(_mm_unpacklo_ps((__m128)r, (__m128)s), _mm_unpackhi_ps((__m128)r, (__m128)s));
  return (v4)_mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq));
#else
  return v4{(p[0] + p[2]) + (p[1] + p[3]), (q[0] + q[2]) + (q[1] + q[3]), (r[0] + r[2]) + (r[1] + r[3]),
            (s[0] + s[2]) + (s[1] + s[3])};
#endif
}

// Weights are asked for, into the first-level cache, kAheadBytes before they are used. After a matrix comes the next one.
struct Ahead {
  const char* next;
  const char* end;
  const char* then;  // null: nothing follows
  int64_t then_bytes;

  // Asks for as many bytes as a step over k consumes.
  SAMOE_ALWAYS void step(int64_t bytes) {
    if (next >= end) {
      if (then == nullptr) return;
      next = then;
      end = then + then_bytes;
      then = nullptr;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(next + i, 0, 3);
    next += bytes;
  }
};

// sums[m] = x[m] . w[n], n = 0 .. 3, for M rows of x and 4 rows of w, of which the last ones may be repeated. S rows of w are
// read side by side. One after another they are a single stream, which comes from memory fastest; four in the cache share
// what is loaded of x.
template <int M, int S, typename W>
SAMOE_INLINE void tile(const char* const* x, const W* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  constexpr int64_t kStepBytes = kLanes * static_cast<int64_t>(sizeof(W));
  vf acc[M][kTileOuts] = {};
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = reinterpret_cast<const float*>(x[m]);
  Ahead wanted = ahead;
#pragma GCC unroll 4
  for (int first = 0; first < kTileOuts; first += S) {
    int64_t k = 0;
    for (; k + kLanes <= inputs; k += kLanes) {
      vf row[M];
      if (kStepBytes >= kLineBytes || k * static_cast<int64_t>(sizeof(W)) % kLineBytes == 0) wanted.step(S * kLineBytes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) row[m] = load(rows[m] + k);
#pragma GCC unroll 4
      for (int n = first; n < first + S; ++n) {
        const vf weight = load(w[n] + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][n] = fused(row[m], weight, acc[m][n]);
      }
    }
    if (k == inputs) continue;
    for (int n = first; n < first + S; ++n) {
      const vf weight = load_part(w[n] + k, inputs - k);
      for (int m = 0; m < M; ++m) acc[m][n] = fused(load_part(rows[m] + k, inputs - k), weight, acc[m][n]);
    }
  }
  ahead = wanted;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = sum_of_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// The same for bf16: x is packed, the even elements of 2 kLanes before the odd ones.
template <int M, int S>
SAMOE_INLINE void tile(const char* const* x, const uint16_t* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  vf acc[M][kTileOuts] = {};
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = reinterpret_cast<const float*>(x[m]);
  Ahead wanted = ahead;
#pragma GCC unroll 4
  for (int first = 0; first < kTileOuts; first += S) {
    for (int64_t k = 0; k < inputs; k += 2 * kLanes) {
      if (4 * kLanes >= kLineBytes || 2 * k % kLineBytes == 0) wanted.step(S * kLineBytes);
      vu pair[S];
      vf weight[S];
#pragma GCC unroll 4
      for (int n = 0; n < S; ++n) pair[n] = load_pairs(w[first + n] + k, inputs - k), weight[n] = (vf)(pair[n] << 16);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const vf row = load(rows[m] + k);
#pragma GCC unroll 4
        for (int n = 0; n < S; ++n) acc[m][first + n] = fused(row, weight[n], acc[m][first + n]);
      }
#pragma GCC unroll 4
      for (int n = 0; n < S; ++n) weight[n] = (vf)(pair[n] & 0xffff0000u);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const vf row = load(rows[m] + k + kLanes);
#pragma GCC unroll 4
        for (int n = 0; n < S; ++n) acc[m][first + n] = fused(row, weight[n], acc[m][first + n]);
      }
    }
  }
  ahead = wanted;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = sum_of_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

template <int S, typename W>
static void tile_of(int64_t num_rows, const char* const* x, const W* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  switch (num_rows) {
    case 1: return tile<1, S>(x, w, inputs, ahead, sums);
    case 2: return tile<2, S>(x, w, inputs, ahead, sums);
#if SAMOE_VECTOR_BYTES >= 32
    case 3: return tile<3, S>(x, w, inputs, ahead, sums);
#endif
#if SAMOE_VECTOR_BYTES == 64
    case 4: return tile<4, S>(x, w, inputs, ahead, sums);
    case 5: return tile<5, S>(x, w, inputs, ahead, sums);
    case 6: return tile<6, S>(x, w, inputs, ahead, sums);
#endif
    default: return;
  }
}

#if defined(__AVX512F__)
// int8 weights by rows of digits. Weights become unsigned by an offset of 128, which the sums' first values take out.
template <int M>
SAMOE_VNNI static void digit_tile(const char* const* x, const int8_t* const* w, int64_t inputs, Ahead& ahead,
                                  v4* sums) {
  const __m512i offset = _mm512_set1_epi8(-128);
  vf whole[M][kTileOuts];
  Ahead wanted = ahead;
#pragma GCC unroll 4
  for (int n = 0; n < kTileOuts; ++n) {
    __m512i sum[M][3];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) sum[m][d] = _mm512_loadu_si512(x[m] + 64 * (d + 1));
    for (int64_t k = 0; k < inputs; k += kLineBytes) {
      wanted.step(kLineBytes);
      const int64_t left = inputs - k;
      const __m512i bytes = left >= kLineBytes ? _mm512_loadu_si512(w[n] + k)
                                               : _mm512_maskz_loadu_epi8((1ull << left) - 1, w[n] + k);
      const __m512i weight = _mm512_xor_si512(bytes, offset);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
        for (int d = 0; d < 3; ++d)
          sum[m][d] = _mm512_dpbusd_epi32(sum[m][d], weight, _mm512_loadu_si512(x[m] + 256 + 3 * k + 64 * d));
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
      whole[m][n] = fused((vf)_mm512_cvtepi32_ps(sum[m][2]), splat(65536.0f),
                          fused((vf)_mm512_cvtepi32_ps(sum[m][1]), splat(256.0f), (vf)_mm512_cvtepi32_ps(sum[m][0])));
  }
  ahead = wanted;
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    float unit;
    memcpy(&unit, x[m], sizeof unit);
    sums[m] = sum_of_four(whole[m][0], whole[m][1], whole[m][2], whole[m][3]) * unit;
  }
}
#endif

// Returns false where rows of x are not digits.
template <typename W>
SAMOE_INLINE bool multiply_digits(int64_t, const char* const*, const W* const*, int64_t, Ahead&, bool, v4*) {
  return false;
}
#if defined(__AVX512F__)
SAMOE_INLINE bool multiply_digits(int64_t num_rows, const char* const* x, const int8_t* const* w, int64_t inputs,
                                  Ahead& ahead, bool by_digits, v4* sums) {
  if (!by_digits) return false;
  switch (num_rows) {
    case 1: digit_tile<1>(x, w, inputs, ahead, sums); break;
    case 2: digit_tile<2>(x, w, inputs, ahead, sums); break;
    case 3: digit_tile<3>(x, w, inputs, ahead, sums); break;
    default: digit_tile<4>(x, w, inputs, ahead, sums);
  }
  return true;
}
#endif

// Where a block of results goes: out[m][n - first] = (sum * scale[n] + bias[n]) * factor, or is added to.
struct DecodeOut {
  float* const* rows;
  int64_t first;
  const float* scale;
  const float* bias;
  bool accumulate;
  float factor;
};

// Up to four sums, from column n on; with all four, sizes of copies are known and become single instructions.
SAMOE_ALWAYS void put_some(const DecodeOut& out, int64_t m, int64_t n, size_t bytes, v4 sums) {
  v4 part = v4{};
  float* place = out.rows[m] + (n - out.first);
  if (out.scale != nullptr) memcpy(&part, out.scale + n, bytes), sums *= part;
  if (out.bias != nullptr) memcpy(&part, out.bias + n, bytes), sums += part;
  sums *= out.factor;
  if (out.accumulate) memcpy(&part, place, bytes), sums = part + sums;
  memcpy(place, &sums, bytes);
}
SAMOE_INLINE void put(const DecodeOut& out, int64_t m, int64_t n, int64_t count, v4 sums) {
  if (count == kTileOuts) {
    put_some(out, m, n, sizeof sums, sums);
  } else {
    put_some(out, m, n, static_cast<size_t>(count) * sizeof(float), sums);
  }
}

// What is read after a block: `bytes` from `data` on, or nothing.
struct Following {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// Up to kRowBlock packed rows of x with rows first .. last - 1 of w.
template <typename W>
static void multiply_block(const char* const* x, int64_t num_rows, const W* w, int64_t inputs, int64_t first,
                           int64_t last, const DecodeOut& out, Following following, bool by_digits) {
  v4 sums[kTileRows];
  const int64_t tile_rows = by_digits ? kDigitRows : (sizeof(W) == 2 ? kPairRows : kTileRows);
  Ahead ahead{reinterpret_cast<const char*>(w + first * inputs) + kAheadBytes, reinterpret_cast<const char*>(w + last * inputs),
              static_cast<const char*>(following.data), following.bytes};
  Ahead nothing{nullptr, nullptr, nullptr, 0};
  for (int64_t n = first; n < last; n += kTileOuts) {
    const int64_t num_outs = last - n < kTileOuts ? last - n : kTileOuts;
    const W* rows[kTileOuts];
    for (int64_t i = 0; i < kTileOuts; ++i) rows[i] = w + (n + (i < num_outs ? i : num_outs - 1)) * inputs;
    // Tiles of nearly equal numbers of rows: small ones are the least efficient.
    const int64_t num_tiles = (num_rows + tile_rows - 1) / tile_rows;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t m = num_rows * i / num_tiles, count = num_rows * (i + 1) / num_tiles - m;
      if (multiply_digits(count, x + m, rows, inputs, i == 0 ? ahead : nothing, by_digits, sums)) {
        // That was all.
      } else if (i == 0) {
        tile_of<1>(count, x + m, rows, inputs, ahead, sums);
      } else {
        tile_of<kTileOuts>(count, x + m, rows, inputs, nothing, sums);
      }
      for (int64_t j = 0; j < count; ++j) put(out, m + j, n, num_outs, sums[j]);
    }
  }
}

// The same for any type of weights; `row` is the first row of the matrix within its stack.
SAMOE_INLINE void multiply(const char* const* x, int64_t num_rows, const Matrix& w, int64_t row, int64_t inputs,
                           int64_t first, int64_t last, DecodeOut out, Following following) {
  const int64_t offset = row * inputs;
  switch (w.type) {
    case WeightType::f32:
      return multiply_block(x, num_rows, static_cast<const float*>(w.data) + offset, inputs, first, last, out,
                            following, false);
    case WeightType::bf16:
      return multiply_block(x, num_rows, static_cast<const uint16_t*>(w.data) + offset, inputs, first, last, out,
                            following, false);
    case WeightType::i8:
      out.scale = w.scale + row;
      return multiply_block(x, num_rows, static_cast<const int8_t*>(w.data) + offset, inputs, first, last, out,
                            following, takes_digits(inputs));
  }
}

// What is asked for ahead from row `row` of a stack of matrices on.
SAMOE_INLINE Following start_of(const Matrix& w, int64_t row, int64_t inputs) {
  const int64_t size = w.type == WeightType::f32 ? 4 : (w.type == WeightType::bf16 ? 2 : 1);
  return {static_cast<const char*>(w.data) + row * inputs * size, kAheadBytes};
}

// One row normalised, times weight, plus bias. The mean square is taken around the mean unless rms.
SAMOE_INLINE void normalise(const float* x, const float* weight, const float* bias, float epsilon, bool rms,
                            int64_t size, float* out) {
  const int64_t whole = size / kLanes * kLanes;
  float mean = 0.0f;
  if (!rms) {
    vf sum = vf{};
    for (int64_t i = 0; i < whole; i += kLanes) sum += load(x + i);
    mean = sum_lanes(sum);
    for (int64_t i = whole; i < size; ++i) mean += x[i];
    mean /= static_cast<float>(size);
  }
  vf squares = vf{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vf d = load(x + i) - mean;
    squares += d * d;
  }
  float square = sum_lanes(squares);
  for (int64_t i = whole; i < size; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < size; ++i) {
    const float y = (x[i] - mean) * scale * weight[i];
    out[i] = bias == nullptr ? y : y + bias[i];
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
