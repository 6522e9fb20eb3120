// Products of few rows of x with rows of weights, as they lie: lanes along the summed dim.
//
// One accumulator per (row of x, row of w), filled in the order of k and folded in a fixed tree. So a result does not
// depend on how many rows of x share the call, and weights need no packing: fp32 ones are used where they were loaded.
#pragma once

#include <cstdlib>

#include "../../decode.h"
#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

typedef float v4 __attribute__((vector_size(16)));
typedef int8_t vb __attribute__((vector_size(SAMOE_VECTOR_BYTES / 4)));

#if SAMOE_VECTOR_BYTES == 64
constexpr int kTileRows = 6;  // 24 sums, 6 rows of x and a weight in 32 registers
#elif SAMOE_VECTOR_BYTES == 32
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileOuts = 4;
constexpr int64_t kRowBlock = 96;   // rows of x that stay in the second-level cache
constexpr int64_t kTaskOuts = 64;   // rows of w that one task takes

// A thread's own memory, kept from call to call: a step of inference allocates nothing.
struct ThreadMemory {
  ~ThreadMemory() { std::free(data); }
  void* bytes(int64_t count) {
    if (count > capacity) {
      std::free(data);
      capacity = (count + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, static_cast<size_t>(capacity));
    }
    return data;
  }
  void* data = nullptr;
  int64_t capacity = 0;
};

// One buffer per source file and thread; the next call may move it.
static float* thread_floats(int64_t count) {
  static thread_local ThreadMemory memory;
  return static_cast<float*>(memory.bytes(count * static_cast<int64_t>(sizeof(float))));
}

SAMOE_INLINE vf load(const int8_t* p) {
  vb b;
  memcpy(&b, p, sizeof b);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#elif defined(__AVX2__)
  long long bits;
  memcpy(&bits, p, sizeof bits);
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits)));
#else
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

// The first n lanes, the others 0; for int8 too, which vec.h does not know.
template <typename T>
SAMOE_INLINE vf load_some(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
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

// Weights that follow are asked for while a tile is computed: with several rows at a time the accesses are no single
// stream, which is what the processor foresees by itself.
constexpr int64_t kPrefetchBytes = 4096;
struct Ahead {
  const char* next;
  const char* end;
  // Asks for as many bytes as a step over k consumes.
  template <typename W>
  inline __attribute__((always_inline)) void step() {
    constexpr int64_t kBytes = kTileOuts * kLanes * static_cast<int64_t>(sizeof(W));
    if (next >= end) return;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(next + i, 0, 3);
    next += kBytes;
  }
};

// sums[m * 4 + n] = x[m] . w[n] for M rows of x and 4 rows of w, of which the last ones may be repeated.
template <int M, typename W>
SAMOE_INLINE void tile(const float* const* x, const W* const* w, int64_t inputs, Ahead ahead, float* sums) {
  vf acc[M][kTileOuts] = {};
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    vf row[M];
    ahead.step<W>();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) row[m] = load(x[m] + k);
#pragma GCC unroll 4
    for (int n = 0; n < kTileOuts; ++n) {
      const vf weight = load(w[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] += row[m] * weight;
    }
  }
  if (k < inputs) {
    for (int n = 0; n < kTileOuts; ++n) {
      const vf weight = load_some(w[n] + k, inputs - k);
      for (int m = 0; m < M; ++m) acc[m][n] += load_some(x[m] + k, inputs - k) * weight;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const v4 four = sum_of_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    memcpy(sums + m * kTileOuts, &four, sizeof four);
  }
}

template <typename W>
static void tile_of(int64_t num_rows, const float* const* x, const W* const* w, int64_t inputs, Ahead ahead,
                    float* sums) {
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

// Where a block of results goes: out[m][n - first] = (sum * scale[n] + bias[n]) * factor, or is added to.
struct DecodeOut {
  float* const* rows;
  int64_t first;
  const float* scale;
  const float* bias;
  bool accumulate;
  float factor;
};

SAMOE_INLINE void put(const DecodeOut& out, int64_t m, int64_t n, float sum) {
  if (out.scale != nullptr) sum *= out.scale[n];
  if (out.bias != nullptr) sum += out.bias[n];
  sum *= out.factor;
  float* place = out.rows[m] + (n - out.first);
  *place = out.accumulate ? *place + sum : sum;
}

SAMOE_INLINE const float* as_floats(const float* w, int64_t, float*) { return w; }
template <typename W>
SAMOE_INLINE const float* as_floats(const W* w, int64_t inputs, float* buffer) {
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) store(buffer + k, load(w + k));
  if (k < inputs) store_part(buffer + k, load_some(w + k, inputs - k), inputs - k);
  return buffer;
}

// Up to kRowBlock rows of x with rows first .. last - 1 of w. floats: room for kTileOuts * inputs floats.
template <typename W>
static void multiply_block(const float* const* x, int64_t num_rows, const W* w, int64_t inputs, int64_t first, int64_t last,
                    const DecodeOut& out, float* floats) {
  float sums[kTileRows * kTileOuts];
  for (int64_t n = first; n < last; n += kTileOuts) {
    const int64_t num_outs = last - n < kTileOuts ? last - n : kTileOuts;
    const W* rows[kTileOuts];
    for (int64_t i = 0; i < kTileOuts; ++i) rows[i] = w + (n + (i < num_outs ? i : num_outs - 1)) * inputs;
    // With more rows than one tile, weights are widened once; the values are the same.
    const bool widen = sizeof(W) < 4 && num_rows > kTileRows;
    const float* wide[kTileOuts];
    if (widen)
      for (int64_t i = 0; i < kTileOuts; ++i) wide[i] = as_floats(rows[i], inputs, floats + i * inputs);
    const char* end = reinterpret_cast<const char*>(w + last * inputs);
    const char* next = reinterpret_cast<const char*>(rows[0]) + kPrefetchBytes;
    for (int64_t m = 0; m < num_rows; m += kTileRows) {
      const int64_t count = num_rows - m < kTileRows ? num_rows - m : kTileRows;
      if (widen) {
        tile_of(count, x + m, wide, inputs, Ahead{nullptr, nullptr}, sums);
      } else {
        tile_of(count, x + m, rows, inputs, m == 0 ? Ahead{next, end} : Ahead{nullptr, nullptr}, sums);
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < num_outs; ++j) put(out, m + i, n + j, sums[i * kTileOuts + j]);
    }
  }
}

// The same for any type of weights; `offset` counts elements before the matrix, `row` its first row among scales.
SAMOE_INLINE void multiply(const float* const* x, int64_t num_rows, const Matrix& w, int64_t row, int64_t inputs,
                           int64_t first, int64_t last, DecodeOut out, float* floats) {
  const int64_t offset = row * inputs;
  switch (w.type) {
    case WeightType::f32:
      multiply_block(x, num_rows, static_cast<const float*>(w.data) + offset, inputs, first, last, out, floats);
      return;
    case WeightType::bf16:
      multiply_block(x, num_rows, static_cast<const uint16_t*>(w.data) + offset, inputs, first, last, out, floats);
      return;
    case WeightType::i8:
      out.scale = w.scale + row;
      multiply_block(x, num_rows, static_cast<const int8_t*>(w.data) + offset, inputs, first, last, out, floats);
      return;
  }
}

// One row normalised, times weight, plus bias. The mean square is taken around the mean unless rms.
SAMOE_INLINE void normalise(const float* x, const float* weight, const float* bias, float epsilon, bool rms, int64_t size,
                            float* out) {
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
