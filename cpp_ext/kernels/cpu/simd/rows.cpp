// Rows to experts and back: whole rows or tokens per thread, each output row written once.
#include <cstdlib>

#include "../../kernels.h"
#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

// y = sum over i of weight[i] * rows[i], for a number of rows known to the compiler (0: known at run time).
template <typename T, int COUNT>
SAMOE_INLINE void weighted_sum(const T* const* rows, const float* weights, int64_t num, int64_t hidden, T* y,
                               bool streamed) {
  const int64_t count = COUNT > 0 ? COUNT : num;
  const int64_t whole = hidden / kLanes * kLanes;
  for (int64_t h = 0; h < whole; h += kLanes) {
    vf sum = load(rows[0] + h) * weights[0];
    for (int64_t i = 1; i < count; ++i) sum += load(rows[i] + h) * weights[i];
    write(y + h, sum, streamed);
  }
  if (whole < hidden) {
    vf sum = vf{};
    for (int64_t i = 0; i < count; ++i) sum += load_part(rows[i] + whole, hidden - whole) * weights[i];
    store_part(y + whole, sum, hidden - whole);
  }
}

template <typename T>
void unpermute_typed(const Unpermute& a) {
  const T* rows = static_cast<const T*>(a.rows_NH);
  T* y = static_cast<T*>(a.y_TH);
  const int64_t row_bytes = a.hidden * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(y, a.num_tokens, row_bytes);
#pragma omp parallel num_threads(a.num_threads)
  {
    const T** kept = static_cast<const T**>(std::malloc(static_cast<size_t>(a.topk) * sizeof(T*)));
    float* weights = static_cast<float*>(std::malloc(static_cast<size_t>(a.topk) * sizeof(float)));
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      int64_t count = 0;
      for (int64_t k = 0; k < a.topk; ++k) {
        const int64_t row = a.row_of_slot_TK[t * a.topk + k];
        if (row < 0) continue;
        kept[count] = rows + row * a.hidden;
        weights[count++] = a.probs_TK == nullptr ? 1.0f : a.probs_TK[t * a.topk + k];
      }
      T* out = y + t * a.hidden;
      if (count == 0) {
        memset(out, 0, static_cast<size_t>(row_bytes));
      } else if (count == 1) {
        weighted_sum<T, 1>(kept, weights, 1, a.hidden, out, streamed);
      } else if (count == 2) {
        weighted_sum<T, 2>(kept, weights, 2, a.hidden, out, streamed);
      } else {
        weighted_sum<T, 0>(kept, weights, count, a.hidden, out, streamed);
      }
    }
    if (streamed) fence();
    std::free(kept);
    std::free(weights);
  }
}

// drow = weight * dy; returns <dy, row>.
template <typename T>
SAMOE_INLINE float row_backward(const T* dy, const T* row, float weight, int64_t hidden, T* drow, bool streamed) {
  vf dots[4] = {};
  int64_t h = 0;
  for (; h + 4 * kLanes <= hidden; h += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const vf gradient = load(dy + h + i * kLanes);
      dots[i] += gradient * load(row + h + i * kLanes);
      write(drow + h + i * kLanes, gradient * weight, streamed);
    }
  }
  for (; h < hidden; h += kLanes) {
    const int64_t n = hidden - h;
    const vf gradient = load_part(dy + h, n);
    dots[0] += gradient * load_part(row + h, n);
    store_part(drow + h, gradient * weight, n);
  }
  return sum_lanes((dots[0] + dots[1]) + (dots[2] + dots[3]));
}

template <typename T>
void unpermute_backward_typed(const UnpermuteBackward& a) {
  const T* dy = static_cast<const T*>(a.dy_TH);
  const T* rows = static_cast<const T*>(a.rows_NH);
  T* drows = static_cast<T*>(a.drows_NH);
  const int64_t row_bytes = a.hidden * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(drows, a.num_tokens * a.topk, row_bytes);
#pragma omp parallel num_threads(a.num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      for (int64_t k = 0; k < a.topk; ++k) {
        const int64_t slot = t * a.topk + k;
        const int64_t row = a.row_of_slot_TK[slot];
        a.dprobs_TK[slot] = row < 0 ? 0.0f
                                    : row_backward(dy + t * a.hidden, rows + row * a.hidden, a.probs_TK[slot], a.hidden,
                                                   drows + row * a.hidden, streamed);
      }
    }
    if (streamed) fence();
  }
}

}  // namespace

void gather_rows(const GatherRows& a) {
  const bool streamed = streams(a.out, a.num_rows, a.row_bytes);
#pragma omp parallel num_threads(a.num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a.num_rows; ++r) {
      const int64_t source = a.divisor == 1 ? a.index_N[r] : a.index_N[r] / a.divisor;
      const char* from = a.x + source * a.row_bytes;
      char* to = a.out + r * a.row_bytes;
      if (!streamed) {
        memcpy(to, from, static_cast<size_t>(a.row_bytes));
        continue;
      }
      for (int64_t i = 0; i < a.row_bytes; i += SAMOE_VECTOR_BYTES) {
        stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
      }
    }
    if (streamed) fence();
  }
}

void copy_streamed(const char* from, char* to, int64_t num_bytes) {
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % SAMOE_VECTOR_BYTES);
  const int64_t head = misaligned == 0 ? 0 : SAMOE_VECTOR_BYTES - misaligned;
  if (num_bytes < head + 4 * SAMOE_VECTOR_BYTES) {
    memcpy(to, from, static_cast<size_t>(num_bytes));
    return;
  }
  memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + SAMOE_VECTOR_BYTES <= num_bytes; i += SAMOE_VECTOR_BYTES) {
    stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  }
  memcpy(to + i, from + i, static_cast<size_t>(num_bytes - i));
  fence();
}

void unpermute(const Unpermute& a) {
  if (a.dtype == DType::f32) {
    unpermute_typed<float>(a);
  } else {
    unpermute_typed<uint16_t>(a);
  }
}

void unpermute_backward(const UnpermuteBackward& a) {
  if (a.dtype == DType::f32) {
    unpermute_backward_typed<float>(a);
  } else {
    unpermute_backward_typed<uint16_t>(a);
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
