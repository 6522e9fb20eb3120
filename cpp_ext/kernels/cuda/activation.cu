// What lies between the products of expert MLPs, over the rows of all experts: activations with bias, their gradients, and
// sums over each expert's rows. A warp a row; meanings as in kernels/cpu/simd/activation.cpp.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

// The expert that owns a row: the first whose rows end after it.
SAMOE_DEVICE int64_t expert_of(const ExpertRows& rows, int64_t row) {
  int64_t low = 0, high = rows.num_experts - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row < rows.ends_e[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

SAMOE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

constexpr float kTwiceRoot2OverPi = 1.5957691216057308f;
constexpr float kCube = 0.044715f;

// gelu(h) = h sigmoid(2 u) with u = sqrt(2 / pi) (h + 0.044715 h^3), which is h / 2 (1 + tanh u).
SAMOE_DEVICE float gelu_gate(float h) { return sigmoid(kTwiceRoot2OverPi * h * (1.0f + kCube * h * h)); }

// V values of h of a row from column c on, its bias added.
template <typename T, int V>
struct Hidden {
  float at[V];
  __device__ __forceinline__ Hidden(const T* h, const T* bias, int64_t c) {
    const Pack<T, V> x = load<V>(h + c);
    for (int v = 0; v < V; ++v) at[v] = to_float(x.at[v]);
    if (bias == nullptr) return;
    const Pack<T, V> b = load<V>(bias + c);
    for (int v = 0; v < V; ++v) at[v] += to_float(b.at[v]);
  }
};

template <typename T, int V>
__global__ void activate_kernel(Activate a) {
  const int64_t row = global_warp();
  if (row >= a.rows.num_rows) return;
  const int64_t up = a.gated ? 2 * a.width : a.width;
  const T* h = static_cast<const T*>(a.h_RU) + row * up;
  const T* bias = a.bias_eU == nullptr ? nullptr : static_cast<const T*>(a.bias_eU) + expert_of(a.rows, row) * up;
  T* out = static_cast<T*>(a.a_RF) + row * a.width;
  for (int64_t f = lane_of_thread() * V; f < a.width; f += kWarp * V) {
    const Hidden<T, V> first(h, bias, f);
    Pack<T, V> result;
    if (a.gated) {
      const Hidden<T, V> second(h, bias, a.width + f);
      for (int v = 0; v < V; ++v) result.at[v] = from_float<T>(first.at[v] * sigmoid(first.at[v]) * second.at[v]);
    } else {
      for (int v = 0; v < V; ++v) result.at[v] = from_float<T>(first.at[v] * gelu_gate(first.at[v]));
    }
    store<V>(out + f, result);
  }
}

template <typename T, int V>
__global__ void activate_backward_kernel(ActivateBackward b) {
  const int64_t row = global_warp();
  if (row >= b.rows.num_rows) return;
  const int64_t up = b.gated ? 2 * b.width : b.width;
  const T* h = static_cast<const T*>(b.h_RU) + row * up;
  const T* bias = b.bias_eU == nullptr ? nullptr : static_cast<const T*>(b.bias_eU) + expert_of(b.rows, row) * up;
  const T* da = static_cast<const T*>(b.da_RF) + row * b.width;
  T* a = static_cast<T*>(b.a_RF) + row * b.width;
  T* dh = static_cast<T*>(b.dh_RU) + row * up;
  for (int64_t f = lane_of_thread() * V; f < b.width; f += kWarp * V) {
    const Hidden<T, V> first(h, bias, f);
    const Pack<T, V> gradient = load<V>(da + f);
    Pack<T, V> activated, dfirst;
    if (b.gated) {
      const Hidden<T, V> second(h, bias, b.width + f);
      Pack<T, V> dsecond;
      for (int v = 0; v < V; ++v) {
        const float s = sigmoid(first.at[v]), silu = first.at[v] * s, d = to_float(gradient.at[v]);
        activated.at[v] = from_float<T>(silu * second.at[v]);
        dfirst.at[v] = from_float<T>(d * second.at[v] * (s + silu * (1.0f - s)));
        dsecond.at[v] = from_float<T>(d * silu);
      }
      store<V>(dh + b.width + f, dsecond);
    } else {
      for (int v = 0; v < V; ++v) {
        const float x = first.at[v], s = gelu_gate(x), gelu = x * s;
        const float slope = kTwiceRoot2OverPi * (1.0f + 3.0f * kCube * x * x);
        activated.at[v] = from_float<T>(gelu);
        dfirst.at[v] = from_float<T>(to_float(gradient.at[v]) * (s + gelu * (1.0f - s) * slope));
      }
    }
    store<V>(a + f, activated);
    store<V>(dh + f, dfirst);
  }
}

template <typename T>
__global__ void add_expert_bias_kernel(ExpertRows rows, int64_t num_columns, const T* bias_eC, T* y_RC) {
  const int64_t row = global_warp();
  if (row >= rows.num_rows) return;
  const T* bias = bias_eC + expert_of(rows, row) * num_columns;
  T* y = y_RC + row * num_columns;
  for (int64_t c = lane_of_thread(); c < num_columns; c += kWarp) y[c] = from_float<T>(to_float(y[c]) + to_float(bias[c]));
}

// A block sums 32 columns of one expert: each warp every eighth row, then the warps in order.
template <typename T>
__global__ void expert_column_sums_kernel(ExpertRows rows, int64_t num_columns, const T* x_RC, float* out_eC) {
  __shared__ float sums[kWarps][kWarp];
  const int64_t tiles = (num_columns + kWarp - 1) / kWarp;
  const int64_t expert = blockIdx.x / tiles, c = blockIdx.x % tiles * kWarp + lane_of_thread();
  const int64_t first = expert == 0 ? 0 : rows.ends_e[expert - 1], last = rows.ends_e[expert];
  float sum = 0.0f;
  if (c < num_columns) {
    for (int64_t row = first + warp_of_thread(); row < last; row += kWarps) sum += to_float(x_RC[row * num_columns + c]);
  }
  sums[warp_of_thread()][lane_of_thread()] = sum;
  __syncthreads();
  if (warp_of_thread() != 0 || c >= num_columns) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp][lane_of_thread()];
  out_eC[expert * num_columns + c] += sum;
}

template <typename T>
void activate_typed(const Activate& a, cudaStream_t stream) {
  const bool wide = is_wide<T>(a.width, a.h_RU, a.bias_eU, a.a_RF);
  launch(wide ? activate_kernel<T, kWide<T>> : activate_kernel<T, 1>, ceil_div(a.rows.num_rows, kWarps), stream, a);
}

template <typename T>
void activate_backward_typed(const ActivateBackward& b, cudaStream_t stream) {
  const bool wide = is_wide<T>(b.width, b.h_RU, b.bias_eU, b.da_RF, b.a_RF, b.dh_RU);
  launch(wide ? activate_backward_kernel<T, kWide<T>> : activate_backward_kernel<T, 1>,
         ceil_div(b.rows.num_rows, kWarps), stream, b);
}

}  // namespace

void activate(const Activate& a, cudaStream_t stream) {
  (a.dtype == DType::f32 ? activate_typed<float> : activate_typed<uint16_t>)(a, stream);
}

void activate_backward(const ActivateBackward& b, cudaStream_t stream) {
  (b.dtype == DType::f32 ? activate_backward_typed<float> : activate_backward_typed<uint16_t>)(b, stream);
}

void add_expert_bias(DType dtype, const ExpertRows& rows, int64_t num_columns, const void* bias_eC, void* y_RC,
                     cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows.num_rows, kWarps);
  if (dtype == DType::f32) {
    launch(add_expert_bias_kernel<float>, blocks, stream, rows, num_columns, static_cast<const float*>(bias_eC),
           static_cast<float*>(y_RC));
  } else {
    launch(add_expert_bias_kernel<uint16_t>, blocks, stream, rows, num_columns, static_cast<const uint16_t*>(bias_eC),
           static_cast<uint16_t*>(y_RC));
  }
}

void expert_column_sums(DType dtype, const ExpertRows& rows, int64_t num_columns, const void* x_RC, float* out_eC,
                        cudaStream_t stream) {
  const int64_t blocks = rows.num_experts * ceil_div(num_columns, kWarp);
  if (dtype == DType::f32) {
    launch(expert_column_sums_kernel<float>, blocks, stream, rows, num_columns, static_cast<const float*>(x_RC), out_eC);
  } else {
    launch(expert_column_sums_kernel<uint16_t>, blocks, stream, rows, num_columns, static_cast<const uint16_t*>(x_RC),
           out_eC);
  }
}

}  // namespace cuda
}  // namespace samoe
