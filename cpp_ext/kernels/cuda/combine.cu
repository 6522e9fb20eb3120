// Pool combination W[l,g] = sum_p A[l,g,p] T[p,g] for all layers in one pass over the banks, and its backward in one pass
// over the layers' gradients. A thread has the same elements of all banks and layers; tiles bound its registers, and what
// a second tile reads again lies in the cache.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

constexpr int kLayerTile = 8;        // layers that the forward sums at a time
constexpr int kBankTile = 4;         // banks that are read, and whose gradients the backward sums, at a time
constexpr int64_t kChunk = 4096;     // elements of a group that a block of the backward takes

template <typename T>
SAMOE_DEVICE T* at(const cpu::Strided3<T>& tensor, int64_t i, int64_t j) {
  return tensor.data + i * tensor.stride0 + j * tensor.stride1;
}

// One tile of layers over V elements. A bank whose coefficient is 0 is read, and adds nothing, whatever it holds.
template <typename T, int V>
SAMOE_DEVICE void combine_tile(const cpu::Combine& c, int64_t first_layer, int64_t g, int64_t n) {
  const int64_t layer_stride = c.num_groups * c.num_banks;
  const float* coefficients = c.coefficients_LGP + first_layer * layer_stride + g * c.num_banks;
  const int64_t num_layers = c.num_layers - first_layer < kLayerTile ? c.num_layers - first_layer : kLayerTile;
  float sums[kLayerTile][V] = {};
  // Several banks are on their way at a time: one load a thread would not keep the memory busy.
  for (int64_t first = 0; first < c.num_banks; first += kBankTile) {
    Pack<float, V> bank[kBankTile];
#pragma unroll
    for (int p = 0; p < kBankTile; ++p) {
      if (first + p < c.num_banks) bank[p] = load<V>(at(c.banks_PGN, first + p, g) + n);
    }
#pragma unroll
    for (int p = 0; p < kBankTile; ++p) {
      if (first + p >= c.num_banks) continue;
#pragma unroll
      for (int l = 0; l < kLayerTile; ++l) {
        const float a = l < num_layers ? coefficients[l * layer_stride + first + p] : 0.0f;
        if (a == 0.0f) continue;
        for (int v = 0; v < V; ++v) sums[l][v] += a * bank[p].at[v];
      }
    }
  }
#pragma unroll
  for (int l = 0; l < kLayerTile; ++l) {
    if (l >= num_layers) continue;
    Pack<T, V> out;
    for (int v = 0; v < V; ++v) out.at[v] = from_float<T>(sums[l][v]);
    store<V>(reinterpret_cast<T*>(at(c.out_LGN, first_layer + l, g)) + n, out);
  }
}

template <typename T, int V>
__global__ void combine_kernel(cpu::Combine c, int64_t blocks_per_group) {
  const int64_t g = blockIdx.x / blocks_per_group;
  const int64_t n = (blockIdx.x % blocks_per_group * kThreads + threadIdx.x) * V;
  if (n >= c.num_elements) return;
  for (int64_t l = 0; l < c.num_layers; l += kLayerTile) combine_tile<T, V>(c, l, g, n);
}

// Up to LT layers and kBankTile banks over a block's elements: dT += A^T dW, and the dot products of dW and T, which are
// left in partial (row stride num_banks).
template <int LT, int V>
SAMOE_DEVICE void backward_tile(const cpu::CombineBackward& c, int64_t first_layer, int64_t first_bank, int64_t g,
                                int64_t first, int64_t last, float* partial) {
  __shared__ float a[LT][kBankTile];
  __shared__ float sums[kWarps][LT][kBankTile];
  const int64_t num_layers = c.num_layers - first_layer, num_banks = c.num_banks - first_bank;  // may exceed the tile
  if (threadIdx.x < LT * kBankTile) {
    const int l = threadIdx.x / kBankTile, p = threadIdx.x % kBankTile;
    const bool inside = l < num_layers && p < num_banks;
    a[l][p] = inside ? c.coefficients_LGP[((first_layer + l) * c.num_groups + g) * c.num_banks + first_bank + p] : 0.0f;
  }
  __syncthreads();
  float dots[LT][kBankTile] = {};
  for (int64_t n = first + threadIdx.x * V; n < last; n += kThreads * V) {
    Pack<float, V> bank[kBankTile], dbank[kBankTile];
#pragma unroll
    for (int p = 0; p < kBankTile; ++p) {
      if (p >= num_banks) continue;
      bank[p] = load<V>(at(c.banks_PGN, first_bank + p, g) + n);
      dbank[p] = load<V>(at(c.dbanks_PGN, first_bank + p, g) + n);
    }
#pragma unroll
    for (int l = 0; l < LT; ++l) {
      if (l >= num_layers) continue;
      const Pack<float, V> dweight = load<V>(at(c.dweights_LGN, first_layer + l, g) + n);
#pragma unroll
      for (int p = 0; p < kBankTile; ++p) {
        if (p >= num_banks) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dots[l][p] += dweight.at[v] * bank[p].at[v];
          dbank[p].at[v] += dweight.at[v] * a[l][p];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kBankTile; ++p) {
      if (p < num_banks) store<V>(at(c.dbanks_PGN, first_bank + p, g) + n, dbank[p]);
    }
  }
#pragma unroll
  for (int l = 0; l < LT; ++l) {
#pragma unroll
    for (int p = 0; p < kBankTile; ++p) {
      const float sum = warp_sum(dots[l][p]);
      if (lane_of_thread() == 0) sums[warp_of_thread()][l][p] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < LT * kBankTile) {
    const int l = threadIdx.x / kBankTile, p = threadIdx.x % kBankTile;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][l][p];
    if (l < num_layers && p < num_banks) partial[(first_layer + l) * c.num_banks + first_bank + p] = sum;
  }
  __syncthreads();  // the next tile uses the same memory
}

template <int LT, int V>
__global__ void combine_backward_kernel(cpu::CombineBackward c, int64_t chunks_per_group, float* partial) {
  const int64_t g = blockIdx.x / chunks_per_group, first = blockIdx.x % chunks_per_group * kChunk;
  const int64_t last = first + kChunk < c.num_elements ? first + kChunk : c.num_elements;
  float* of_block = partial + blockIdx.x * c.num_layers * c.num_banks;
  for (int64_t l = 0; l < c.num_layers; l += LT) {
    for (int64_t p = 0; p < c.num_banks; p += kBankTile) backward_tile<LT, V>(c, l, p, g, first, last, of_block);
  }
}

// A block a coefficient: the chunks' sums join in double.
__global__ void sum_chunks(cpu::CombineBackward c, int64_t chunks_per_group, const float* partial) {
  const int64_t p = blockIdx.x % c.num_banks, g = blockIdx.x / c.num_banks % c.num_groups;
  const int64_t l = blockIdx.x / (c.num_banks * c.num_groups);
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks_per_group; chunk += kThreads)
    sum += partial[((g * chunks_per_group + chunk) * c.num_layers + l) * c.num_banks + p];
  sum = block_sum(sum);
  if (threadIdx.x == 0) c.dcoefficients_LGP[blockIdx.x] = static_cast<float>(sum);
}

template <typename T>
bool is_wide_view(const cpu::Strided3<T>& tensor, int64_t unit) {
  return is_aligned(tensor.data) && tensor.stride0 % unit == 0 && tensor.stride1 % unit == 0;
}

template <typename T>
void combine_typed(const cpu::Combine& c, cudaStream_t stream) {
  // Strides of the result are in bytes; four bf16 elements are 8 of them.
  const bool wide = c.num_elements % 4 == 0 && is_wide_view(c.banks_PGN, 4) && is_wide_view(c.out_LGN, 4 * sizeof(T));
  const int64_t blocks = ceil_div(c.num_elements, kThreads * (wide ? 4 : 1));
  launch(wide ? combine_kernel<T, 4> : combine_kernel<T, 1>, c.num_groups * blocks, stream, c, blocks);
}

template <int LT>
void backward_tiles(const cpu::CombineBackward& c, float* partial, cudaStream_t stream) {
  const bool wide = c.num_elements % 2 == 0 && is_wide_view(c.banks_PGN, 2) && is_wide_view(c.dweights_LGN, 2) &&
                    is_wide_view(c.dbanks_PGN, 2);
  const int64_t chunks = ceil_div(c.num_elements, kChunk);
  launch(wide ? combine_backward_kernel<LT, 2> : combine_backward_kernel<LT, 1>, c.num_groups * chunks, stream, c, chunks,
         partial);
}

}  // namespace

void combine(const cpu::Combine& c, cudaStream_t stream) {
  (c.out_dtype == DType::f32 ? combine_typed<float> : combine_typed<uint16_t>)(c, stream);
}

int64_t combine_backward_workspace_bytes(const cpu::CombineBackward& c) {
  return c.num_groups * ceil_div(c.num_elements, kChunk) * c.num_layers * c.num_banks * 4;
}

void combine_backward(const cpu::CombineBackward& c, void* workspace, cudaStream_t stream) {
  float* partial = static_cast<float*>(workspace);
  if (c.num_layers <= 4) {
    backward_tiles<4>(c, partial, stream);
  } else if (c.num_layers <= 8) {
    backward_tiles<8>(c, partial, stream);
  } else {
    backward_tiles<16>(c, partial, stream);
  }
  launch(sum_chunks, c.num_layers * c.num_groups * c.num_banks, stream, c, ceil_div(c.num_elements, kChunk), partial);
}

}  // namespace cuda
}  // namespace samoe
