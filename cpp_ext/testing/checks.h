// Random inputs and comparisons of the check programs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace samoe {

inline std::mt19937 random_bits(1);

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

inline std::vector<float> floats(int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = std::normal_distribution<float>()(random_bits);
  return values;
}

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "difference: %s\n", what);
  std::exit(1);
}

inline bool near(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b)); }

}  // namespace samoe
