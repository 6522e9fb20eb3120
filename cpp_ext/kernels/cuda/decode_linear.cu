// Inference: linear layers, norms, and the combination of one expert's weights; meanings as in
// kernels/cpu/simd/decode_linear.cpp.
#include "decode_product.cuh"

namespace samoe {
namespace cuda {
namespace {

struct LinearJob {
  Product p;
  cpu::DecodeLinear a;

  __device__ ProductTile tile(int64_t i) const {
    const int64_t first = i * kTile, left = a.num_tokens - first;
    return {0, first, static_cast<int>(left < kTile ? left : kTile)};
  }
  __device__ int64_t row(const ProductTile&, int64_t unit, int r) const {
    return unit * kRows + r < a.outputs ? unit * kRows + r : a.outputs - 1;
  }
  __device__ int64_t source(const ProductTile& tile, int t) const { return tile.first + t; }
  __device__ void finish(const ProductTile& tile, int64_t unit, int r, int t, float sum) const {
    const int64_t n = unit * kRows + r;
    if (n >= a.outputs || t >= tile.count) return;
    if (a.w_NK.scale != nullptr) sum *= a.w_NK.scale[n];
    if (a.bias_N != nullptr) sum += a.bias_N[n];
    float* out = a.out_TN + (tile.first + t) * a.outputs + n;
    *out = a.accumulate ? *out + sum : sum;
  }
};

// The sum over the block in every thread.
SAMOE_DEVICE float block_total(float value) {
  __shared__ float sums[kWarps];
  value = warp_sum(value);
  __syncthreads();  // an earlier total was read
  if (lane_of_thread() == 0) sums[warp_of_thread()] = value;
  __syncthreads();
  value = sums[0];
  for (int warp = 1; warp < kWarps; ++warp) value += sums[warp];
  return value;
}

// A block a token.
__global__ void norm_kernel(cpu::DecodeNorm a) {
  const float* x = a.x_TH + blockIdx.x * a.hidden;
  float* out = a.out_TH + blockIdx.x * a.hidden;
  const float size = static_cast<float>(a.hidden);
  float sum = 0.0f;
  if (!a.rms) {
    for (int64_t h = threadIdx.x; h < a.hidden; h += kThreads) sum += x[h];
  }
  const float mean = a.rms ? 0.0f : block_total(sum) / size;
  float squares = 0.0f;
  for (int64_t h = threadIdx.x; h < a.hidden; h += kThreads) squares += (x[h] - mean) * (x[h] - mean);
  const float inverse = 1.0f / sqrtf(block_total(squares) / size + a.epsilon);
  for (int64_t h = threadIdx.x; h < a.hidden; h += kThreads) {
    const float y = (x[h] - mean) * inverse * a.weight_H[h];
    out[h] = a.bias_H == nullptr ? y : y + a.bias_H[h];
  }
}

struct Banks {
  cpu::Matrix at[kMaxDecodeBanks];
};

template <typename W, int V>
SAMOE_DEVICE void add_bank(const void* data, int64_t offset, float coefficient, float (&sum)[V]) {
  const Pack<W, V> w = load<V>(static_cast<const W*>(data) + offset);
  for (int v = 0; v < V; ++v) sum[v] += coefficient * to_float(w.at[v]);
}

// V columns of a row of the weighted sum. A bank whose coefficient is 0 is left unread.
template <int V>
SAMOE_DEVICE void add_banks(const cpu::CombineRows& a, const Banks& banks, int64_t row, int64_t column, float (&sum)[V]) {
  for (int64_t p = 0; p < a.num_banks; ++p) {
    const float coefficient = a.coefficients_P[p];
    if (coefficient == 0.0f) continue;
    const int64_t offset = row * a.num_cols + column;
    const cpu::Matrix& bank = banks.at[p];
    if (bank.type == WeightType::f32) {
      add_bank<float, V>(bank.data, offset, coefficient, sum);
    } else if (bank.type == WeightType::bf16) {
      add_bank<uint16_t, V>(bank.data, offset, coefficient, sum);
    } else {
      add_bank<int8_t, V>(bank.data, offset, coefficient * bank.scale[row], sum);
    }
  }
}

template <typename T, int V>
SAMOE_DEVICE void store_floats(void* out, int64_t offset, const float (&values)[V]) {
  Pack<T, V> pack;
  for (int v = 0; v < V; ++v) pack.at[v] = from_float<T>(values[v]);
  store<V>(static_cast<T*>(out) + offset, pack);
}

// A warp a row. int8 passes over the banks twice, once for the row's peak: the second time they come from the cache.
template <int V>
__global__ void combine_rows_kernel(cpu::CombineRows a, Banks banks) {
  const int64_t row = global_warp();
  if (row >= a.num_rows) return;
  float inverse = 0.0f;
  if (a.out_type == WeightType::i8) {
    float peak = 0.0f, zeros = 0.0f;  // zeros: NaN where a number is not finite
    for (int64_t c = lane_of_thread() * V; c < a.num_cols; c += kWarp * V) {
      float sum[V] = {};
      add_banks<V>(a, banks, row, c, sum);
      for (int v = 0; v < V; ++v) {
        peak = fabsf(sum[v]) > peak ? fabsf(sum[v]) : peak;
        zeros += sum[v] * 0.0f;
      }
    }
    peak = warp_max(peak);
    zeros = warp_sum(zeros);
    inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    if (lane_of_thread() == 0) a.out_scale[row] = peak / 127.0f + zeros;
  }
  for (int64_t c = lane_of_thread() * V; c < a.num_cols; c += kWarp * V) {
    const int64_t offset = row * a.num_cols + c;
    float sum[V] = {};
    add_banks<V>(a, banks, row, c, sum);
    if (a.out_type == WeightType::f32) {
      store_floats<float, V>(a.out, offset, sum);
    } else if (a.out_type == WeightType::bf16) {
      store_floats<uint16_t, V>(a.out, offset, sum);
    } else {
      Pack<int8_t, V> pack;
      for (int v = 0; v < V; ++v) pack.at[v] = static_cast<int8_t>(rintf(sum[v] * inverse));  // ties to even
      store<V>(static_cast<int8_t*>(a.out) + offset, pack);
    }
  }
}

}  // namespace

void decode_linear(const cpu::DecodeLinear& a, cudaStream_t stream) {
  const Product p = {a.w_NK.data, a.x_TK, a.inputs, ceil_div(a.num_tokens, kTile), ceil_div(a.outputs, kRows)};
  multiply(a.w_NK.type, LinearJob{p, a}, stream);
}

void decode_norm(const cpu::DecodeNorm& a, cudaStream_t stream) { launch(norm_kernel, a.num_tokens, stream, a); }

void combine_rows(const cpu::CombineRows& a, cudaStream_t stream) {
  assert(a.num_banks <= kMaxDecodeBanks);
  Banks banks = {};
  bool wide = a.num_cols % kWide<float> == 0 && is_aligned(a.out);
  for (int64_t p = 0; p < a.num_banks; ++p) {
    banks.at[p] = a.banks_P[p];
    wide = wide && is_aligned(a.banks_P[p].data);
  }
  const int64_t blocks = ceil_div(a.num_rows, kWarps);
  launch(wide ? combine_rows_kernel<kWide<float>> : combine_rows_kernel<1>, blocks, stream, a, banks);
}

}  // namespace cuda
}  // namespace samoe
