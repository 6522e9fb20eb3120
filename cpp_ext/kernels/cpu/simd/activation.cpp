// What lies between an expert's products: activations and their gradients, sums over rows, changes of type. One thread
// each: the caller's threads work on different experts.
#include "../../kernels.h"
#include "bf16_vec.h"
#include "vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

SAMOE_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

constexpr float kTwiceRoot2OverPi = 1.5957691216057308f;
constexpr float kCube = 0.044715f;

// gelu(h) = h sigmoid(2 u) with u = sqrt(2 / pi) (h + 0.044715 h^3), which is h / 2 (1 + tanh u).
SAMOE_INLINE vf gelu(vf h) { return h * sigmoid(kTwiceRoot2OverPi * h * (1.0f + kCube * h * h)); }

SAMOE_INLINE void gelu_backward(vf h, vf da, vf* a, vf* dh) {
  const vf square = h * h;
  const vf s = sigmoid(kTwiceRoot2OverPi * h * (1.0f + kCube * square));
  const vf slope = kTwiceRoot2OverPi * (1.0f + 3.0f * kCube * square);
  *a = h * s;
  *dh = da * (s + *a * (1.0f - s) * slope);
}

SAMOE_INLINE vf rounded(vf v) {
  const vh h = to_bf16(v);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

template <typename T>
SAMOE_INLINE vf hidden(const T* h, const float* bias, int64_t n) {
  const vf value = load_part(h, n);
  return bias == nullptr ? value : value + load_part(bias, n);
}

template <typename HT>
SAMOE_INLINE vf hidden_kept(const HT* h, uint16_t* kept, const float* bias, int64_t n) {
  vf value = load_part(h, n);
  if (kept != nullptr) {
    store_part(kept, value, n);
    value = rounded(value);
  }
  return bias == nullptr ? value : value + load_part(bias, n);
}

template <typename HT, typename AT>
void activate_typed(const Activate& a) {
  const int64_t up = a.gated ? 2 * a.width : a.width;
  for (int64_t r = 0; r < a.num_rows; ++r) {
    const HT* h = static_cast<const HT*>(a.h_nU) + r * up;
    uint16_t* kept = a.rounded_nU == nullptr ? nullptr : a.rounded_nU + r * up;
    AT* out = static_cast<AT*>(a.a_nF) + r * a.width;
    for (int64_t f = 0; f < a.width; f += kLanes) {
      const int64_t n = a.width - f;
      const float* bias = a.bias_U == nullptr ? nullptr : a.bias_U + f;
      const vf first = hidden_kept(h + f, kept == nullptr ? nullptr : kept + f, bias, n);
      if (!a.gated) {
        store_part(out + f, gelu(first), n);
        continue;
      }
      const int64_t g = a.width + f;
      bias = a.bias_U == nullptr ? nullptr : a.bias_U + g;
      const vf second = hidden_kept(h + g, kept == nullptr ? nullptr : kept + g, bias, n);
      store_part(out + f, first * sigmoid(first) * second, n);
    }
  }
}

template <typename HT, typename DT>
void activate_backward_typed(const ActivateBackward& b) {
  const int64_t up = b.gated ? 2 * b.width : b.width;
  for (int64_t r = 0; r < b.num_rows; ++r) {
    const HT* h = static_cast<const HT*>(b.h_nU) + r * up;
    const DT* da = static_cast<const DT*>(b.da_nF) + r * b.width;
    DT* a_out = static_cast<DT*>(b.a_nF) + r * b.width;
    DT* dh = static_cast<DT*>(b.dh_nU) + r * up;
    for (int64_t f = 0; f < b.width; f += kLanes) {
      const int64_t n = b.width - f;
      const float* bias = b.bias_U == nullptr ? nullptr : b.bias_U + f;
      const vf first = hidden(h + f, bias, n), gradient = load_part(da + f, n);
      if (!b.gated) {
        vf a, d;
        gelu_backward(first, gradient, &a, &d);
        store_part(a_out + f, a, n);
        store_part(dh + f, d, n);
        continue;
      }
      const int64_t g = b.width + f;
      const vf second = hidden(h + g, b.bias_U == nullptr ? nullptr : b.bias_U + g, n);
      const vf s = sigmoid(first), silu = first * s;
      store_part(a_out + f, silu * second, n);
      store_part(dh + f, gradient * second * (s + silu * (1.0f - s)), n);
      store_part(dh + g, gradient * silu, n);
    }
  }
}

// Rows are summed in blocks, so that a long sum of small terms does not vanish beside a large one, and join out at the
// end: adding to a gradient that is not zero then gives the bits of adding the finished sum.
constexpr int64_t kSumRows = 32;

template <typename T, int VECTORS>
void sum_columns(const ColumnSums& s, int64_t c, int64_t n) {
  const T* x = static_cast<const T*>(s.x) + c;
  vf total[VECTORS] = {};
  for (int64_t start = 0; start < s.num_rows; start += kSumRows) {
    const int64_t end = s.num_rows < start + kSumRows ? s.num_rows : start + kSumRows;
    vf sum[VECTORS] = {};
    for (int64_t r = start; r < end; ++r) {
      for (int i = 0; i < VECTORS; ++i) sum[i] += load_part(x + r * s.row_stride + i * kLanes, n);
    }
    for (int i = 0; i < VECTORS; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < VECTORS; ++i) {
    float* out = s.out + c + i * kLanes;
    store_part(out, load_part(out, n) + total[i], n);
  }
}

template <typename T>
void column_sums_typed(const ColumnSums& s) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= s.num_columns; c += 4 * kLanes) sum_columns<T, 4>(s, c, kLanes);
  for (; c < s.num_columns; c += kLanes) sum_columns<T, 1>(s, c, s.num_columns - c);
}

template <typename FROM, typename TO>
void convert_typed(const Convert& c) {
  const FROM* from = static_cast<const FROM*>(c.from);
  TO* to = static_cast<TO*>(c.to);
  for (int64_t i = 0; i < c.num; i += kLanes) {
    const int64_t n = c.num - i;
    const vf value = load_part(from + i, n);
    store_part(to + i, c.accumulate ? load_part(to + i, n) + value : value, n);
  }
}

template <typename T>
void add_bias_typed(const AddBias& b) {
  for (int64_t r = 0; r < b.num_rows; ++r) {
    const float* x = b.x + r * b.num_columns;
    T* y = static_cast<T*>(b.y) + r * b.num_columns;
    for (int64_t c = 0; c < b.num_columns; c += kLanes) {
      const int64_t n = b.num_columns - c;
      const vf value = load_part(x + c, n);
      store_part(y + c, b.bias == nullptr ? value : value + load_part(b.bias + c, n), n);
    }
  }
}

}  // namespace

void activate(const Activate& a) {
  if (a.h_dtype == DType::bf16 && has_bf16_product()) {
    bf16_activate(a);
  } else if (a.h_dtype == DType::bf16) {
    activate_typed<uint16_t, uint16_t>(a);
  } else {
    activate_typed<float, float>(a);
  }
}

void activate_backward(const ActivateBackward& b) {
  if (b.d_dtype == DType::bf16 && has_bf16_product()) {
    bf16_activate_backward(b);
  } else if (b.d_dtype == DType::bf16) {
    activate_backward_typed<uint16_t, uint16_t>(b);
  } else if (b.h_dtype == DType::bf16) {
    activate_backward_typed<uint16_t, float>(b);
  } else {
    activate_backward_typed<float, float>(b);
  }
}

void column_sums(const ColumnSums& s) {
  if (s.dtype == DType::bf16) {
    column_sums_typed<uint16_t>(s);
  } else {
    column_sums_typed<float>(s);
  }
}

void convert(const Convert& c) {
  const bool from_bf16 = c.from_dtype == DType::bf16, to_bf16 = c.to_dtype == DType::bf16;
  if (from_bf16 && !to_bf16) {
    convert_typed<uint16_t, float>(c);
  } else if (!from_bf16 && to_bf16) {
    convert_typed<float, uint16_t>(c);
  } else if (from_bf16) {
    convert_typed<uint16_t, uint16_t>(c);
  } else {
    convert_typed<float, float>(c);
  }
}

void add_bias(const AddBias& b) {
  if (b.y_dtype == DType::bf16) {
    add_bias_typed<uint16_t>(b);
  } else {
    add_bias_typed<float>(b);
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
