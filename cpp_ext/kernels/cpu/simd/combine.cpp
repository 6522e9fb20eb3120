// Pool combination W[l,g] = sum_p A[l,g,p] T[p,g] for all layers in one pass over the banks, and its backward in one
// pass over the layers' gradients. Work is cut into blocks of a group's elements that stay in the first-level cache.
#include <cstdlib>
#include <new>

#include "../../kernels.h"
#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kForwardBlock = 1024;  // elements: a page of each bank
constexpr int64_t kBackwardBlock = 512;  // elements summed in fp32 before they join a double
// A block draws on some 20 streams, more than the hardware prefetchers follow: the next block is asked into the
// second-level cache while this one is worked on. Without it the backward took twice the time.
constexpr int64_t kAhead = kBackwardBlock;
constexpr int64_t kBackwardTask = 16384;  // elements a task sums in double
constexpr int kMaxTerms = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks for the lines of p[from:to].
SAMOE_INLINE void prefetch(const float* p, int64_t from, int64_t to) {
  for (int64_t i = (from + 15) / 16 * 16; i < to; i += 16) __builtin_prefetch(p + i);
}

// out[0:n] = sum over i < TERMS of a[i] * t[i][0:n], plus partial[0:n] where it is given.
template <typename T, int TERMS>
void axpy_block(const float* a, const float* const* t, const float* partial, int64_t n, T* out, bool streamed) {
  vf coefficient[TERMS > 0 ? TERMS : 1];
  for (int i = 0; i < TERMS; ++i) coefficient[i] = splat(a[i]);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    vf sum = partial != nullptr ? load(partial + j) : vf{};
    for (int i = 0; i < TERMS; ++i) sum += coefficient[i] * load(t[i] + j);
    write(out + j, sum, streamed);
  }
  if (whole < n) {
    vf sum = partial != nullptr ? load_part(partial + whole, n - whole) : vf{};
    for (int i = 0; i < TERMS; ++i) sum += coefficient[i] * load_part(t[i] + whole, n - whole);
    store_part(out + whole, sum, n - whole);
  }
}

// The same for a number of terms that is known at run time.
template <typename T, int TERMS = kMaxTerms>
void axpy(int terms, const float* a, const float* const* t, const float* partial, int64_t n, T* out, bool streamed) {
  if constexpr (TERMS > 0) {
    if (terms < TERMS) return axpy<T, TERMS - 1>(terms, a, t, partial, n, out, streamed);
  }
  axpy_block<T, TERMS>(a, t, partial, n, out, streamed);
}

// One layer's block. Banks with coefficient 0 are passed over; more than 8 terms go through a partial sum in the cache.
template <typename T>
void combine_block(const Combine& c, int64_t l, int64_t g, int64_t start, int64_t n, float* partial, bool streamed) {
  const float* coefficients_P = c.coefficients_LGP + (l * c.num_groups + g) * c.num_banks;
  T* out = reinterpret_cast<T*>(c.out_LGN.at(l, g)) + start;
  float a[kMaxTerms];
  const float* t[kMaxTerms];
  int terms = 0;
  const float* carried = nullptr;
  for (int64_t p = 0; p < c.num_banks; ++p) {
    if (coefficients_P[p] == 0.0f) continue;
    if (terms == kMaxTerms) {
      axpy<float>(terms, a, t, carried, n, partial, false);
      carried = partial;
      terms = 0;
    }
    a[terms] = coefficients_P[p];
    t[terms++] = c.banks_PGN.at(p, g) + start;
  }
  axpy<T>(terms, a, t, carried, n, out, streamed && can_stream(out));
}

template <typename T>
void combine_typed(const Combine& c) {
  const int64_t blocks = ceil_div(c.num_elements, kForwardBlock);
  const int64_t out_bytes = c.num_layers * c.num_groups * c.num_elements * static_cast<int64_t>(sizeof(T));
  const bool streamed = out_bytes >= kStreamBytes;
#pragma omp parallel num_threads(c.num_threads)
  {
    float partial[kForwardBlock];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < c.num_groups * blocks; ++task) {
      const int64_t g = task / blocks;
      const int64_t start = task % blocks * kForwardBlock;
      const int64_t n = at_most(kForwardBlock, c.num_elements - start);
      const int64_t ahead =
          start + kForwardBlock < c.num_elements ? at_most(kForwardBlock, c.num_elements - start - n) : 0;
      for (int64_t l = 0; l < c.num_layers; ++l) {
        // The next block comes in while this one is written: each layer's turn fetches its share.
        const int64_t from = ahead * l / c.num_layers, to = ahead * (l + 1) / c.num_layers;
        for (int64_t p = 0; p < c.num_banks; ++p) prefetch(c.banks_PGN.at(p, g) + start + n, from, to);
        combine_block<T>(c, l, g, start, n, partial, streamed);
      }
    }
    if (streamed) fence();
  }
}

#if defined(__AVX512F__)
constexpr int kTile = 4;  // 16 dot products, 4 gradients and 8 operands: 28 of 32 registers
#else
constexpr int kTile = 2;
#endif

// One vector of a tile: dots += dW T^T, dT += A^T dW.
template <int LT, int PT, bool WHOLE>
SAMOE_INLINE void tile_step(const float* a, int64_t a_stride, const float* const* dw, const float* const* t,
                            float* const* dt, int64_t j, int64_t n, vf (&dots)[LT][PT]) {
  vf bank[PT], dbank[PT];
  for (int p = 0; p < PT; ++p) {
    bank[p] = load_part(t[p] + j, n);
    dbank[p] = load_part(dt[p] + j, n);
    if (WHOLE) {
      __builtin_prefetch(t[p] + j + kAhead, 0, 2);
      __builtin_prefetch(dt[p] + j + kAhead, 1, 2);
    }
  }
  for (int l = 0; l < LT; ++l) {
    if (WHOLE) __builtin_prefetch(dw[l] + j + kAhead, 0, 2);
    const vf dweight = load_part(dw[l] + j, n);
    for (int p = 0; p < PT; ++p) {
      dots[l][p] += dweight * bank[p];
      dbank[p] += dweight * a[l * a_stride + p];
    }
  }
  for (int p = 0; p < PT; ++p) store_part(dt[p] + j, dbank[p], n);
}

// A tile of LT layers and PT banks over n elements; sums (row stride num_banks) += its dot products.
template <int LT, int PT>
void tile_block(const float* a, int64_t num_banks, int64_t a_stride, const float* const* dw, const float* const* t,
                float* const* dt, int64_t n, double* sums) {
  vf dots[LT][PT] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) tile_step<LT, PT, true>(a, a_stride, dw, t, dt, j, kLanes, dots);
  if (whole < n) tile_step<LT, PT, false>(a, a_stride, dw, t, dt, whole, n - whole, dots);
  for (int l = 0; l < LT; ++l)
    for (int p = 0; p < PT; ++p) sums[l * num_banks + p] += sum_lanes(dots[l][p]);
}

// The same for numbers of layers and banks that are known at run time.
template <int LT = kTile, int PT = kTile>
void tile_of(int lt, int pt, const float* a, int64_t num_banks, int64_t a_stride, const float* const* dw,
             const float* const* t, float* const* dt, int64_t n, double* sums) {
  if constexpr (LT > 1) {
    if (lt < LT) return tile_of<LT - 1, PT>(lt, pt, a, num_banks, a_stride, dw, t, dt, n, sums);
  }
  if constexpr (PT > 1) {
    if (pt < PT) return tile_of<LT, PT - 1>(lt, pt, a, num_banks, a_stride, dw, t, dt, n, sums);
  }
  tile_block<LT, PT>(a, num_banks, a_stride, dw, t, dt, n, sums);
}

// All layers and banks of one block of one group.
void backward_block(const CombineBackward& c, int64_t g, int64_t start, int64_t n, double* sums) {
  const int64_t a_stride = c.num_groups * c.num_banks;
  for (int64_t p = 0; p < c.num_banks; p += kTile) {
    const int pt = static_cast<int>(at_most(kTile, c.num_banks - p));
    const float* t[kTile];
    float* dt[kTile];
    for (int i = 0; i < pt; ++i) {
      t[i] = c.banks_PGN.at(p + i, g) + start;
      dt[i] = c.dbanks_PGN.at(p + i, g) + start;
    }
    for (int64_t l = 0; l < c.num_layers; l += kTile) {
      const int lt = static_cast<int>(at_most(kTile, c.num_layers - l));
      const float* dw[kTile];
      for (int i = 0; i < lt; ++i) dw[i] = c.dweights_LGN.at(l + i, g) + start;
      const float* a = c.coefficients_LGP + l * a_stride + g * c.num_banks + p;
      tile_of(lt, pt, a, c.num_banks, a_stride, dw, t, dt, n, sums + l * c.num_banks + p);
    }
  }
}

}  // namespace

void combine(const Combine& c) {
  if (c.out_dtype == DType::f32) {
    combine_typed<float>(c);
  } else {
    combine_typed<uint16_t>(c);
  }
}

void combine_backward(const CombineBackward& c) {
  const int64_t tasks_per_group = ceil_div(c.num_elements, kBackwardTask);
  const int64_t num_tasks = c.num_groups * tasks_per_group;
  const int64_t num_sums = c.num_layers * c.num_banks;
  double* sums = static_cast<double*>(std::calloc(static_cast<size_t>(num_tasks * num_sums + 1), sizeof(double)));
  if (sums == nullptr) throw std::bad_alloc();
#pragma omp parallel for schedule(static) num_threads(c.num_threads)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t g = task / tasks_per_group;
    const int64_t first = task % tasks_per_group * kBackwardTask;
    const int64_t last = at_most(first + kBackwardTask, c.num_elements);
    for (int64_t start = first; start < last; start += kBackwardBlock)
      backward_block(c, g, start, at_most(kBackwardBlock, last - start), sums + task * num_sums);
  }
  // Tasks are added in order, so the result does not depend on the number of threads.
  for (int64_t g = 0; g < c.num_groups; ++g) {
    for (int64_t i = 0; i < num_sums; ++i) {
      double sum = 0.0;
      for (int64_t task = g * tasks_per_group; task < (g + 1) * tasks_per_group; ++task)
        sum += sums[task * num_sums + i];
      const int64_t l = i / c.num_banks, p = i % c.num_banks;
      c.dcoefficients_LGP[(l * c.num_groups + g) * c.num_banks + p] = static_cast<float>(sum);
    }
  }
  std::free(sums);
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
