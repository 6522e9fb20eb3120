// One token's row of a router: room for it in whole vectors, its order by size, its scores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

SAMOE_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

SAMOE_INLINE float* aligned_floats(int64_t count) {
  return static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((count * 4 + 64 + 63) / 64 * 64)));
}

// One thread's rows, padded to whole vectors, in memory of its own or of a caller's.
struct Scratch {
  explicit Scratch(int64_t num_experts) : width(padded(num_experts)), base(aligned_floats(kRows * width)), owned(base) {}
  Scratch(int64_t num_experts, float* memory) : width(padded(num_experts)), base(memory) {}
  ~Scratch() { std::free(owned); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* row(int i) { return base + i * width; }
  static constexpr int64_t kRows = 5;
  int64_t width;
  float* base;
  float* owned = nullptr;
};

// Copies E logits to a padded row; the padding scores nothing.
SAMOE_INLINE void copy_logits(const float* logits_E, int64_t num_experts, float* row, int64_t width) {
  memcpy(row, logits_E, static_cast<size_t>(num_experts) * sizeof(float));
  for (int64_t e = num_experts; e < width; ++e) row[e] = -__builtin_inff();
}

// Integers that order as floats do: NaN above infinity, the zeros equal. INT32_MIN marks padding and taken experts.
SAMOE_INLINE void make_keys(const float* row, int64_t num_experts, int64_t width, int32_t* keys) {
  for (int64_t e = 0; e < width; e += kLanes) {
    const vf x = load(row + e) + 0.0f;
    const vi bits = (vi)x;
    const vi key = select((vi)(x != x), splat_int(INT32_MAX), bits ^ ((bits >> 31) & INT32_MAX));
    memcpy(keys + e, &key, sizeof key);
  }
  for (int64_t e = num_experts; e < width; ++e) keys[e] = INT32_MIN;
}

// Takes the best key, the lowest expert among equals, and marks it taken.
SAMOE_INLINE int64_t take_best(int32_t* keys, int64_t width) {
  vi lane_index;
  for (int64_t i = 0; i < kLanes; ++i) lane_index[i] = static_cast<int32_t>(i);
  vi best_key, best_index = lane_index;
  memcpy(&best_key, keys, sizeof best_key);
  vi index = lane_index;
  for (int64_t e = kLanes; e < width; e += kLanes) {
    index += static_cast<int32_t>(kLanes);
    vi key;
    memcpy(&key, keys + e, sizeof key);
    const vi better = (vi)(key > best_key);
    best_key = select(better, key, best_key);
    best_index = select(better, index, best_index);
  }
  int32_t key_of[kLanes], index_of[kLanes];
  memcpy(key_of, &best_key, sizeof best_key);
  memcpy(index_of, &best_index, sizeof best_index);
  int64_t best = 0;
  for (int64_t i = 1; i < kLanes; ++i) {
    const bool better = key_of[i] > key_of[best] || (key_of[i] == key_of[best] && index_of[i] < index_of[best]);
    best = better ? i : best;
  }
  keys[index_of[best]] = INT32_MIN;
  return index_of[best];
}

// Where all logits are low, sigmoid scores are taken in units of exp(peak): so their sum does not vanish.
SAMOE_INLINE float sigmoid_unit(float peak) { return peak < 0.0f ? peak : 0.0f; }

// Sigmoid scores of a row, divided by exp(unit) (padding scores 0); returns their sum.
SAMOE_INLINE float sigmoids(const float* row, int64_t width, float unit, float* out) {
  const float one = unit == 0.0f ? 1.0f : std::exp(unit);
  vf sum = vf{};
  for (int64_t e = 0; e < width; e += kLanes) {
    const vf y = 1.0f / (one + exp(unit - load(row + e)));
    store(out + e, y);
    sum += y;
  }
  return sum_lanes(sum);
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
