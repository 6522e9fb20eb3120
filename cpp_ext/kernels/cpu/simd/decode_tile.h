// Products of few rows of x with rows of weights, as they lie: lanes along the summed dim. Streams are in decode_stream.h.
//
// One accumulator per (row of x, row of w), filled in the order of k and folded in a fixed tree. So a result does not
// depend on how many rows of x share the call, and weights need no packing: they are used where they were loaded. With few
// rows of x they are read one row after another, or two side by side, as one stream, which is what comes from memory fastest;
// more rows of x are multiplied with four rows of w at a time, which loads the least. Rows of x are packed once a call instead,
// into the form that weights of a type are cheapest to multiply with (decode_rows.h).
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
constexpr int kDigitRows = 2;                              // for digits: three sums
constexpr int kStreamRows = 4;                             // of x that a stream takes, in bf16
constexpr int kMostRows = kTileRows < kStreamRows ? kStreamRows : kTileRows;
constexpr int kTileOuts = 4;
constexpr int64_t kRowBlock = 96;  // rows of x that stay in the second-level cache
constexpr int64_t kPartBytes = 24 << 10;  // of rows of x, most of a small first-level cache
constexpr int64_t kTaskBytes = 512 << 10;  // of a task's weights, half of the second-level cache
constexpr int64_t kTaskOuts = 32;  // rows of w that one task takes
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPieceBytes = 1 << 10;  // of a row, for which a stream finds out once what to ask for
constexpr int64_t kPageBytes = 4 << 10;   // of memory
constexpr int64_t kPages = 8;              // that are asked for in turn
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

// Where lines lie that are asked for one after another: as they come, or from kPages pages in turn. A table, because a stream has
// no time to compute it. A piece may begin with the last line of the pages: the places after it are 0, a line already there.
struct LineOrder {
  constexpr explicit LineOrder(int64_t num_pages) : places() {
    for (int64_t i = 0; i < kPageBytes / kLineBytes * kPages; ++i)
      places[i] = static_cast<int32_t>(i % num_pages * kPageBytes + i / num_pages * kLineBytes);
  }
  int32_t places[kPageBytes / kLineBytes * kPages + kPieceBytes / kLineBytes * 2];
};
constexpr LineOrder kInOrder(1), kInTurn(kPages);

// What a stream asks for, line by line.
struct Asked {
  const char* data;
  const int32_t* places;  // from data on
};

template <Reading kReading>
SAMOE_ALWAYS void ask_for_line(Asked& asked) {
  if (kReading == Reading::pages_in_turn) {
    __builtin_prefetch(asked.data + *asked.places++, 0, 3);
  } else {
    __builtin_prefetch(asked.data, 0, kReading == Reading::first_cache ? 3 : 2);
    asked.data += kLineBytes;
  }
}

// Weights are asked for before they are used: by tiles into the second-level cache, a tile or kAheadBytes before, since accesses
// to several rows at a time are not the single stream that the processor foresees; by a stream line by line,
// as `Reading` says. After a matrix comes the next one.
struct Ahead {
  const char* next;
  const char* end;
  const char* then;  // null: nothing follows
  int64_t then_bytes;
  const char* group = next;  // of pages that are asked for in turn

  // Asks for as many bytes as a step over k consumes.
  SAMOE_ALWAYS void step(int64_t bytes) {
    if (next >= end) {
      if (then == nullptr) return;
      next = then;
      end = then + then_bytes;
      then = nullptr;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += bytes;
  }

  // The next `bytes`, for a stream to ask for line by line; where nothing follows, what it reads itself.
  template <Reading kReading>
  SAMOE_ALWAYS Asked take(int64_t bytes, const void* reads) {
    if (next >= end) {
      if (then == nullptr) return {static_cast<const char*>(reads), kInOrder.places};
      group = next = then;
      end = then + then_bytes;
      then = nullptr;
    }
    const char* const begin = next;
    next += bytes;
    if (kReading != Reading::pages_in_turn) return {begin, nullptr};
    if (begin - group >= kPages * kPageBytes) group += kPages * kPageBytes;
    if (end - group < kPages * kPageBytes) return {begin, kInOrder.places};
    return {group, kInTurn.places + (begin - group) / kLineBytes};
  }
};

// How far ahead of their use weights are asked for where `side` rows of w are read side by side: by tiles a tile at least, by
// streams of pairs a number of pairs, so that what they ask for ends with their last row and continues with the first one that
// follows.
SAMOE_INLINE int64_t ahead_bytes(int64_t row_bytes, int64_t side, Reading reading) {
  const int64_t bytes = side * (row_bytes > 0 ? row_bytes : 1);
  const int64_t least = reading == Reading::pages_in_turn ? kPages * kPageBytes : kAheadBytes;
  if (side == 1) return least;
  if (side == kTileOuts) return bytes < kAheadBytes ? kAheadBytes : bytes;
  return (least + bytes - 1) / bytes * bytes;
}

// sums[m] = x[m] . w[n], n = 0 .. 3, for M rows of x and 4 rows of w, of which the last ones may be repeated.
template <int M, typename W>
SAMOE_INLINE void tile(const char* const* x, const W* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  vf acc[M][kTileOuts] = {};
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = reinterpret_cast<const float*>(x[m]);
  Ahead wanted = ahead;
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    vf row[M];
    wanted.step(kTileOuts * kLanes * static_cast<int64_t>(sizeof(W)));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) row[m] = load(rows[m] + k);
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n) {
      const vf weight = load(w[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = fused(row[m], weight, acc[m][n]);
    }
  }
  if (k < inputs) {
    for (int n = 0; n < kTileOuts; ++n) {
      const vf weight = load_part(w[n] + k, inputs - k);
      for (int m = 0; m < M; ++m) acc[m][n] = fused(load_part(rows[m] + k, inputs - k), weight, acc[m][n]);
    }
  }
  ahead = wanted;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = sum_of_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// The same for bf16: x is packed, the even elements of 2 kLanes before the odd ones.
template <int M>
SAMOE_INLINE void tile(const char* const* x, const uint16_t* const* w, int64_t inputs, Ahead& ahead, v4* sums) {
  vf acc[M][kTileOuts] = {};
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = reinterpret_cast<const float*>(x[m]);
  Ahead wanted = ahead;
  for (int64_t k = 0; k < inputs; k += 2 * kLanes) {
    wanted.step(kTileOuts * kLanes * 4);
    vu pair[kTileOuts];
    vf weight[kTileOuts];
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n) pair[n] = load_pairs(w[n] + k, inputs - k), weight[n] = (vf)(pair[n] << 16);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vf row = load(rows[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < kTileOuts; ++n) acc[m][n] = fused(row, weight[n], acc[m][n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n) weight[n] = (vf)(pair[n] & 0xffff0000u);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vf row = load(rows[m] + k + kLanes);
#pragma GCC unroll 4
      for (int n = 0; n < kTileOuts; ++n) acc[m][n] = fused(row, weight[n], acc[m][n]);
    }
  }
  ahead = wanted;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[m] = sum_of_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

template <typename W>
static __attribute__((noinline)) void tile_of(int64_t num_rows, const char* const* x, const W* const* w, int64_t inputs,
                                              Ahead& ahead, v4* sums) {
  switch (num_rows) {
    case 1: return tile<1>(x, w, inputs, ahead, sums);
    case 2: return tile<2>(x, w, inputs, ahead, sums);
#if SAMOE_VECTOR_BYTES >= 32
    case 3: return tile<3>(x, w, inputs, ahead, sums);
#endif
#if SAMOE_VECTOR_BYTES == 64
    case 4: return tile<4>(x, w, inputs, ahead, sums);
    case 5: return tile<5>(x, w, inputs, ahead, sums);
    case 6: return tile<6>(x, w, inputs, ahead, sums);
#endif
    default: return;
  }
}

#if defined(__AVX512F__)
// int8 weights by rows of digits. Weights become unsigned by an offset of 128, which the sums' first values take out.
template <int M>
SAMOE_VNNI static void digit_tile(const char* const* x, const int8_t* const* w, int64_t inputs, Ahead& ahead,
                                  v4* sums) {
  vi low[M][kTileOuts], middle[M][kTileOuts], high[M][kTileOuts];
#pragma GCC unroll 2
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n) {
      memcpy(&low[m][n], x[m] + 64, 64);
      memcpy(&middle[m][n], x[m] + 128, 64);
      memcpy(&high[m][n], x[m] + 192, 64);
    }
  }
  const __m512i offset = _mm512_set1_epi8(-128);
  Ahead wanted = ahead;
  for (int64_t k = 0; k < inputs; k += 64) {
    wanted.step(kTileOuts * 64);
    const int64_t left = inputs - k;
    __m512i weight[kTileOuts];
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n) {
      const __m512i bytes = left >= 64 ? _mm512_loadu_si512(w[n] + k)
                                       : _mm512_maskz_loadu_epi8((1ull << left) - 1, w[n] + k);
      weight[n] = _mm512_xor_si512(bytes, offset);
    }
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
      const char* digits = x[m] + 256 + 3 * k;
      const __m512i digit0 = _mm512_loadu_si512(digits);
#pragma GCC unroll 4
      for (int n = 0; n < kTileOuts; ++n) low[m][n] = (vi)_mm512_dpbusd_epi32((__m512i)low[m][n], weight[n], digit0);
      const __m512i digit1 = _mm512_loadu_si512(digits + 64);
#pragma GCC unroll 4
      for (int n = 0; n < kTileOuts; ++n)
        middle[m][n] = (vi)_mm512_dpbusd_epi32((__m512i)middle[m][n], weight[n], digit1);
      const __m512i digit2 = _mm512_loadu_si512(digits + 128);
#pragma GCC unroll 4
      for (int n = 0; n < kTileOuts; ++n) high[m][n] = (vi)_mm512_dpbusd_epi32((__m512i)high[m][n], weight[n], digit2);
    }
  }
  ahead = wanted;
#pragma GCC unroll 2
  for (int m = 0; m < M; ++m) {
    vf whole[kTileOuts];
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n)
      whole[n] = fused((vf)_mm512_cvtepi32_ps((__m512i)high[m][n]), splat(65536.0f),
                       fused((vf)_mm512_cvtepi32_ps((__m512i)middle[m][n]), splat(256.0f),
                             (vf)_mm512_cvtepi32_ps((__m512i)low[m][n])));
    float unit;
    memcpy(&unit, x[m], sizeof unit);
    sums[m] = sum_of_four(whole[0], whole[1], whole[2], whole[3]) * unit;
  }
}
#endif

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
