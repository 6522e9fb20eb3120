// Rows of x in the form in which products with weights of a type take them, and weights that are only added.
//
// fp32: as they are. bf16: 2 kLanes at a time, the even ones before the odd ones, because the weights of a register are
// widened to fp32 as its upper and lower halves. int8: three signed digits to the base 256, where the processor
// multiplies bytes; sums of digits times weights are exact, and a row's unit is 2^-23 of its largest magnitude.
#pragma once

#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../../decode.h"
#include "vec.h"

#define SAMOE_ALWAYS inline __attribute__((always_inline))
#define SAMOE_VNNI __attribute__((target("avx512vnni")))

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

// A thread's own memory, kept from call to call: a step of inference allocates nothing.
struct ThreadMemory {
  ~ThreadMemory() { std::free(data); }
  void* bytes(int64_t count) {
    if (count > capacity) {
      std::free(data);
      capacity = (count + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, static_cast<size_t>(capacity));
      if (data == nullptr) {  // which would read as: not packed
        capacity = 0;
        throw std::bad_alloc();
      }
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

// Floats for each thread of a parallel region, made before it: a failure inside would end the process.
class ThreadFloats {
 public:
  ThreadFloats(int num_threads, int64_t count)
      : count_((count + 15) / 16 * 16), data_(thread_floats(num_threads * count_)) {}
  float* own() const {
#if defined(_OPENMP)
    return data_ + omp_get_thread_num() * count_;
#else
    return data_;
#endif
  }

 private:
  int64_t count_;
  float* data_;
};

// 2 kLanes bf16 as they lie, two in a lane; those after the first `left` are 0.
SAMOE_INLINE vu load_pairs(const uint16_t* p, int64_t left) {
  vu pairs = vu{};
  if (left >= 2 * kLanes) {
    memcpy(&pairs, p, sizeof pairs);
  } else {
    memcpy(&pairs, p, static_cast<size_t>(left) * sizeof(uint16_t));
  }
  return pairs;
}

template <typename W>
SAMOE_INLINE void add_row(const W* row, float coefficient, int64_t num_cols, bool first, float* sum) {
  for (int64_t k = 0; k < num_cols; k += kLanes) {
    const int64_t n = num_cols - k;
    const vf product = load_part(row + k, n) * coefficient;
    store_part(sum + k, first ? product : load_part(sum + k, n) + product, n);
  }
}

// sum = coefficient * a row of a matrix of any type; or, where it is not the first, sum += it.
SAMOE_INLINE void add_row(const Matrix& w, int64_t row, float coefficient, int64_t num_cols, bool first, float* sum) {
  const int64_t offset = row * num_cols;
  switch (w.type) {
    case WeightType::f32:
      return add_row(static_cast<const float*>(w.data) + offset, coefficient, num_cols, first, sum);
    case WeightType::bf16:
      return add_row(static_cast<const uint16_t*>(w.data) + offset, coefficient, num_cols, first, sum);
    case WeightType::i8:
      return add_row(static_cast<const int8_t*>(w.data) + offset, coefficient * w.scale[row], num_cols, first, sum);
  }
}

// A row's length in whole pairs of vectors.
SAMOE_INLINE int64_t packed_floats(int64_t inputs) { return (inputs + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// Whether rows for int8 weights are digits: sums of 255 * 128 * inputs / 16 must fit, with room, into 32 bits.
static bool takes_digits(int64_t inputs) {
#if defined(__AVX512F__)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return has_vnni && inputs <= 1 << 18;
#else
  return inputs < 0;
#endif
}

// Bytes of a packed row; 0: rows are taken as they are.
static int64_t packed_bytes(WeightType type, int64_t inputs) {
  if (type == WeightType::bf16) return packed_floats(inputs) * static_cast<int64_t>(sizeof(float));
  if (type == WeightType::i8 && takes_digits(inputs)) return 256 + (inputs + 63) / 64 * 192;
  return 0;
}

static void pack_pairs(const float* x, int64_t inputs, float* out) {
  int64_t k = 0;
#if defined(__AVX512F__)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (; k + 2 * kLanes <= inputs; k += 2 * kLanes) {
    const __m512 a = _mm512_loadu_ps(x + k), b = _mm512_loadu_ps(x + k + kLanes);
    _mm512_storeu_ps(out + k, _mm512_permutex2var_ps(a, even, b));
    _mm512_storeu_ps(out + k + kLanes, _mm512_permutex2var_ps(a, odd, b));
  }
#endif
  for (; k < inputs; k += 2 * kLanes) {
    float both[2 * kLanes] = {};
    memcpy(both, x + k, static_cast<size_t>(inputs - k < 2 * kLanes ? inputs - k : 2 * kLanes) * sizeof(float));
    for (int64_t i = 0; i < kLanes; ++i) {
      out[k + i] = both[2 * i];
      out[k + kLanes + i] = both[2 * i + 1];
    }
  }
}

#if defined(__AVX512F__)
// A row of digits: its unit (64 bytes), for each digit the value at which a lane's sum begins (64 bytes each), then for
// 64 elements at a time the lowest, middle and highest digits. A number that is not finite makes the unit one, too.
SAMOE_VNNI static void pack_digits(const float* x, int64_t inputs, char* out) {
  constexpr float kLargest = 8355000.0f;  // a little less than three digits hold, 127 * (65536 + 256 + 1), for rounding
  __m512 peaks = _mm512_setzero_ps(), zeros = _mm512_setzero_ps();
  for (int64_t k = 0; k < inputs; k += kLanes) {
    const vf v = inputs - k >= kLanes ? load(x + k) : load_part(x + k, inputs - k);
    peaks = _mm512_max_ps(peaks, _mm512_abs_ps((__m512)v));
    zeros = (__m512)((vf)zeros + v * 0.0f);
  }
  const float peak = _mm512_reduce_max_ps(peaks), unit = peak / kLargest + _mm512_reduce_add_ps(zeros);
  const __m512 inverse = _mm512_set1_ps(peak > 1e-30f ? kLargest / peak : 0.0f);
  memcpy(out, &unit, sizeof unit);
  __m512i sums[3] = {};
  for (int64_t k = 0; k < inputs; k += 64) {
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t left = inputs - k - i * kLanes;
      const vf v = left >= kLanes ? load(x + k + i * kLanes) : load_part(x + k + i * kLanes, left > 0 ? left : 0);
      __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)v, inverse));
      for (int64_t d = 0; d < 3; ++d) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(number, 24), 24);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 256 + 3 * k + 64 * d + 16 * i), _mm512_cvtepi32_epi8(digit));
        number = _mm512_srai_epi32(_mm512_sub_epi32(number, digit), 8);
      }
    }
    for (int64_t d = 0; d < 3; ++d)
      sums[d] = _mm512_dpbusd_epi32(sums[d], _mm512_set1_epi8(1), _mm512_loadu_si512(out + 256 + 3 * k + 64 * d));
  }
  for (int64_t d = 0; d < 3; ++d)
    _mm512_storeu_si512(out + 64 * (d + 1), _mm512_mullo_epi32(sums[d], _mm512_set1_epi32(-128)));
}
#endif

// Rows of one product, packed or as they are.
struct PackedRows {
  // floats: rows of `inputs`; memory: for as many packed ones, `packed_bytes` each. The threads pack before they read.
  PackedRows(const float* floats, int64_t inputs, WeightType type, void* memory)
      : source(floats), inputs(inputs), type(type), row_bytes(packed_bytes(type, inputs)) {
    if (row_bytes > 0) packed = static_cast<char*>(memory);
  }
  void pack(int64_t row) const {
    char* out = packed + row * row_bytes;
    if (type == WeightType::bf16) pack_pairs(source + row * inputs, inputs, reinterpret_cast<float*>(out));
#if defined(__AVX512F__)
    if (type == WeightType::i8) pack_digits(source + row * inputs, inputs, out);
#endif
  }
  // Whether parts of a row that begin at a multiple of `size` can be packed by those who compute them.
  bool takes_parts(int64_t size) const { return packed != nullptr && type == WeightType::bf16 && size % (2 * kLanes) == 0; }
  void pack_part(int64_t row, int64_t first, int64_t count) const {
    pack_pairs(source + row * inputs + first, count, reinterpret_cast<float*>(packed + row * row_bytes) + first);
  }
  const char* row(int64_t index) const {
    return packed != nullptr ? packed + index * row_bytes : reinterpret_cast<const char*>(source + index * inputs);
  }
  const float* source;
  int64_t inputs;
  WeightType type;
  int64_t row_bytes;
  char* packed = nullptr;
};

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
