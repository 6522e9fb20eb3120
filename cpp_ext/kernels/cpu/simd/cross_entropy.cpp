// Softmax cross-entropy over (a part of) the vocabulary. The forward keeps three numbers a token instead of the
// probabilities; the backward makes the gradient from the logits in one pass.
#include "../../kernels.h"
#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kSumBlock = 4096;  // elements summed in fp32 before they join a double

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
SAMOE_INLINE vf load_logits(const T* row, int64_t v, int64_t width) {
  constexpr T kLowest = sizeof(T) == 4 ? static_cast<T>(-__builtin_inff()) : static_cast<T>(0xff80);
  return load_part(row + v, width - v, kLowest);
}

template <typename T>
float peak_of(const T* row, int64_t width) {
  vf peak[4];
  for (vf& part : peak) part = splat(-__builtin_inff());
  int64_t v = 0;
  for (; v + 4 * kLanes <= width; v += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const vf x = load(row + v + i * kLanes);
      peak[i] = select((vi)(x > peak[i]), x, peak[i]);
    }
  }
  for (; v < width; v += kLanes) {
    const vf x = load_logits(row, v, width);
    peak[0] = select((vi)(x > peak[0]), x, peak[0]);
  }
  float best = max_lanes(peak[0]);
  for (int i = 1; i < 4; ++i) best = max_lanes(peak[i]) > best ? max_lanes(peak[i]) : best;
  return best;
}

// A NaN logit is never the peak, but its exponential makes the sum NaN.
template <typename T>
double sum_of(const T* row, int64_t width, float peak) {
  double total = 0.0;
  for (int64_t start = 0; start < width; start += kSumBlock) {
    const int64_t end = at_most(start + kSumBlock, width);
    vf sums[2] = {};
    int64_t v = start;
    for (; v + 2 * kLanes <= end; v += 2 * kLanes) {
      sums[0] += exp(load(row + v) - peak);
      sums[1] += exp(load(row + v + kLanes) - peak);
    }
    for (; v < end; v += kLanes) sums[0] += exp(load_logits(row, v, end) - peak);
    total += sum_lanes(sums[0] + sums[1]);
  }
  return total;
}

template <typename T>
SAMOE_INLINE float one_logit(const T* row, int64_t v) {
  return sum_lanes(load_part(row + v, 1));
}

// The column of a token's label, or -1 where the label is another part's. Labels may be any numbers.
template <typename A>
SAMOE_INLINE int64_t column_of(const A& a, int64_t t) {
  const int64_t label = a.labels_T[t];
  return label >= a.first_id && label - a.first_id < a.width ? label - a.first_id : -1;
}

template <typename T>
void forward_typed(const CrossEntropyForward& a) {
  const T* logits = static_cast<const T*>(a.logits_TV);
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const T* row = logits + t * a.width;
    const int64_t label = column_of(a, t);
    a.peak_T[t] = peak_of(row, a.width);
    a.sum_T[t] = static_cast<float>(sum_of(row, a.width, a.peak_T[t]));
    a.target_T[t] = label >= 0 ? one_logit(row, label) : 0.0f;
  }
}

template <typename T>
void backward_typed(const CrossEntropyBackward& a) {
  const T* logits = static_cast<const T*>(a.logits_TV);
  T* dlogits = static_cast<T*>(a.dlogits_TV);
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
  const bool streamed = streams(dlogits, a.num_tokens, row_bytes);
#pragma omp parallel num_threads(a.num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      const T* row = logits + t * a.width;
      T* out = dlogits + t * a.width;
      const float gradient = a.dloss_T[t], logsumexp = a.logsumexp_T[t];
      for (int64_t v = 0; v < a.width; v += kLanes) {
        const vf value = exp(load_logits(row, v, a.width) - logsumexp) * gradient;
        if (a.width - v < kLanes) {
          store_part(out + v, value, a.width - v);
        } else {
          write(out + v, value, streamed);
        }
      }
      const int64_t label = column_of(a, t);
      if (label < 0) continue;
      if (streamed) fence();  // before an ordinary store into the same line
      const vf value = exp(splat(one_logit(row, label) - logsumexp)) * gradient - gradient;
      store_part(out + label, value, 1);
    }
    if (streamed) fence();
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a) {
  if (a.dtype == DType::f32) {
    forward_typed<float>(a);
  } else {
    forward_typed<uint16_t>(a);
  }
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  if (a.dtype == DType::f32) {
    backward_typed<float>(a);
  } else {
    backward_typed<uint16_t>(a);
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
