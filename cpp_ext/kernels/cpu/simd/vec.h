// Vectors of one instruction set, written with the compilers' vector types: one source, compiled once per set.
//
// SAMOE_ISA names the set and the namespace. The files of this directory use no standard-library template: a weak
// symbol compiled here with AVX-512 could be the one that the linker keeps for code that runs on every CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SAMOE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SAMOE_VECTOR_BYTES 32
#else
#define SAMOE_VECTOR_BYTES 16
#endif

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

constexpr int64_t kLanes = SAMOE_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(SAMOE_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(SAMOE_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(SAMOE_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(SAMOE_VECTOR_BYTES / 2)));
typedef int8_t vb __attribute__((vector_size(SAMOE_VECTOR_BYTES / 4)));

#define SAMOE_INLINE static inline __attribute__((always_inline))

SAMOE_INLINE vf splat(float value) { return value - vf{}; }
SAMOE_INLINE vi splat_int(int32_t value) { return value + vi{}; }

SAMOE_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
SAMOE_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// bf16 as raw bits: the upper half of an fp32; stored with round to nearest even, NaN kept a NaN.
SAMOE_INLINE vf load(const uint16_t* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
SAMOE_INLINE vh to_bf16(vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = (vu)(v != v);
  return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vh);
}
SAMOE_INLINE void store(uint16_t* p, vf v) {
  const vh h = to_bf16(v);
  memcpy(p, &h, sizeof h);
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

// The first n lanes, or all where n is larger; the others filled.
template <typename T>
SAMOE_INLINE vf load_part(const T* p, int64_t n, T fill = T{}) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) buffer[i] = fill;
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <typename T>
SAMOE_INLINE void store_part(T* p, vf v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// Stores past the cache; p is aligned to the vector that is written. fence() makes them visible to other threads.
SAMOE_INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
SAMOE_INLINE void stream(uint16_t* p, vf v) {
  const vh h = to_bf16(v);
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
  memcpy(p, &h, sizeof h);
#endif
}
SAMOE_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
SAMOE_INLINE bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % SAMOE_VECTOR_BYTES == 0; }

// Above this size a result does not stay in the cache anyway: written past it, its lines need not be read first.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// Whether rows that follow each other are written past the cache.
SAMOE_INLINE bool streams(const void* rows, int64_t num_rows, int64_t row_bytes) {
  return num_rows * row_bytes >= kStreamBytes && can_stream(rows) && row_bytes % SAMOE_VECTOR_BYTES == 0;
}
template <typename T>
SAMOE_INLINE void write(T* p, vf v, bool streamed) {
  if (streamed) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

SAMOE_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
SAMOE_INLINE vi select(vi mask, vi yes, vi no) { return (mask & yes) | (~mask & no); }

// The larger of two numbers; b where a is not one.
SAMOE_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select((vi)(a > b), a, b);
#endif
}

SAMOE_INLINE float sum_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
SAMOE_INLINE float max_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// e^x to about 1 ulp; 0 below -87.3, infinity above 88.3, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; the Taylor series of degree 7 in r leaves a relative error of 5e-9.
SAMOE_INLINE vf exp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf inside = select((vi)(x > 88.3f), splat(88.3f), select((vi)(x < -87.3f), splat(-87.3f), x));
  const vf shifted = inside * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = (inside - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  vf y = splat(1.0f / 5040.0f);
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  y = y * (vf)exponent;
  y = select((vi)(x < -87.3f), vf{}, y);
  return select((vi)(x > 88.3f), splat(__builtin_inff()), y);
}

// Writes exp(x - peak) of whole vectors of x; returns their sum.
SAMOE_INLINE float exponentials(const float* x, int64_t size, float* out, float* peak) {
  vf peaks = load(x);
  for (int64_t i = kLanes; i < size; i += kLanes) {
    const vf v = load(x + i);
    peaks = select((vi)(v > peaks), v, peaks);
  }
  *peak = max_lanes(peaks);
  vf sum = vf{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const vf y = exp(load(x + i) - *peak);
    store(out + i, y);
    sum += y;
  }
  return sum_lanes(sum);
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
