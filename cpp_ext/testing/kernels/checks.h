// Random inputs and comparisons of the check programs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../kernels/kernels.h"

namespace samoe {

inline std::mt19937 random_bits(1);

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

inline std::vector<float> floats(int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = std::normal_distribution<float>()(random_bits);
  return values;
}

inline float value_of(float x) { return x; }
inline float value_of(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// bf16, rounded towards zero.
inline uint16_t high_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "difference: %s\n", what);
  std::exit(1);
}

inline bool near(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b)); }

// Weights of some type, and their values in fp32.
struct Weights {
  Weights(int64_t num_rows, int64_t cols, WeightType type) : values(floats(num_rows * cols)), matrix{type, nullptr, nullptr} {
    const size_t size = type == WeightType::f32 ? 4 : (type == WeightType::bf16 ? 2 : 1);
    data.resize(values.size() * size);
    for (int64_t row = 0; row < num_rows; ++row) scale.push_back(0.01f * static_cast<float>(pick(1, 5)));
    for (size_t i = 0; i < values.size(); ++i) {
      float& value = values[i];
      const uint16_t high = high_half(value);
      if (type == WeightType::bf16) value = value_of(high);
      const int8_t small = static_cast<int8_t>(std::lround(std::fmin(std::fmax(40.0f * value, -127.0f), 127.0f)));
      if (type == WeightType::i8) value = static_cast<float>(small) * scale[i / static_cast<size_t>(cols)];
      std::memcpy(&data[i * size], type == WeightType::f32 ? static_cast<const void*>(&value)
                                   : type == WeightType::bf16 ? static_cast<const void*>(&high) : &small, size);
    }
    matrix = {type, data.data(), type == WeightType::i8 ? scale.data() : nullptr};
  }
  std::vector<float> values, scale;
  std::vector<char> data;
  cpu::Matrix matrix;
};

}  // namespace samoe
