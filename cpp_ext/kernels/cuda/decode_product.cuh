// Inference: few rows of fp32 activations times rows of weights, which are streamed once for kTile rows of activations.
// A warp multiplies kRows rows of weights with kTile rows of activations; where rows are long, the warps of a block take
// slices of them. A sum's order depends on the row's length alone: it has the same bits in any batch.
#pragma once

#include "device.cuh"

namespace samoe {
namespace cuda {

constexpr int kRows = 4;  // rows of weights of a warp
constexpr int kTile = 8;  // rows of activations that share a reading of the weights
static_assert(kRows * kTile == kWarp, "a warp ends with one sum a lane");

SAMOE_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }

// A tile of one matrix' work: `count` rows of activations.
struct ProductTile {
  int64_t expert, first;
  int count;
};

// Adds this lane's products of inputs first, first + step, .. (V at a time) to sums[r * kTile + t].
template <typename W, int V>
SAMOE_DEVICE void add_products(const W* const (&rows)[kRows], const float* const (&x)[kTile], int count, int64_t inputs,
                               int64_t first, int64_t step, float (&sums)[kWarp]) {
  constexpr int kPart = V < kWide<float> ? V : kWide<float>;
  for (int64_t k = first; k < inputs; k += step) {
    Pack<W, V> w[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) w[r] = load<V>(rows[r] + k);
#pragma unroll
    for (int part = 0; part < V; part += kPart) {
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        if (t >= count) continue;
        const Pack<float, kPart> values = load<kPart>(x[t] + k + part);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) sums[r * kTile + t] += to_float(w[r].at[part + i]) * values.at[i];
        }
      }
    }
  }
}

// Where the rows of both kinds start, how long they are, and the grid: tiles of activations, and units of kRows rows of
// weights.
struct Product {
  const void* weights;
  const float* x;
  int64_t inputs, num_tiles, num_units;
};

// A Job has a product p and says what is multiplied and what becomes of a sum:
//   tile(i): a tile of activations; those without rows are skipped;
//   row(tile, unit, r), source(tile, t): the row of weights and the row of activations; any valid one beyond the end;
//   finish(tile, unit, r, t, sum): called by all lanes of a warp, each with its sum; row and t may be beyond the end.
template <typename W, int V, typename Job>
__global__ void product_kernel(Job job, int num_slices) {
  __shared__ float partial[kWarps][kWarp];
  const Product& p = job.p;
  const ProductTile tile = job.tile(blockIdx.x % p.num_tiles);  // neighbours share weights
  if (tile.count == 0) return;
  const int lane = lane_of_thread(), warp = warp_of_thread(), slice = warp % num_slices;
  const int64_t unit = blockIdx.x / p.num_tiles * (kWarps / num_slices) + warp / num_slices;
  float sums[kWarp] = {};
  if (unit < p.num_units) {
    const W* rows[kRows];
    const float* x[kTile];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = static_cast<const W*>(p.weights) + job.row(tile, unit, r) * p.inputs;
#pragma unroll
    for (int t = 0; t < kTile; ++t) x[t] = p.x + job.source(tile, t < tile.count ? t : 0) * p.inputs;
    add_products<W, V>(rows, x, tile.count, p.inputs, (slice * kWarp + lane) * V, num_slices * kWarp * V, sums);
  }
  sum_scattered<kWarp, 1>(sums);
  float sum = sums[0];
  if (num_slices > 1) {
    partial[warp][lane] = sum;
    __syncthreads();
    if (slice != 0) return;
    for (int other = 1; other < num_slices; ++other) sum += partial[warp + other][lane];
  }
  if (unit < p.num_units) job.finish(tile, unit, lane / kTile, lane % kTile, sum);
}

template <typename W, typename Job>
void multiply_typed(const Job& job, cudaStream_t stream) {
  const Product& p = job.p;
  const bool wide = is_wide<W>(p.inputs, p.weights, p.x);
  const int64_t chunks = ceil_div(p.inputs, kWarp * (wide ? kWide<W> : 1));
  int num_slices = 1;
  while (num_slices < kWarps && 2 * num_slices <= chunks) num_slices *= 2;
  const int64_t blocks = ceil_div(p.num_units, kWarps / num_slices) * p.num_tiles;
  launch(wide ? product_kernel<W, kWide<W>, Job> : product_kernel<W, 1, Job>, blocks, stream, job, num_slices);
}

template <typename Job>
void multiply(WeightType type, const Job& job, cudaStream_t stream) {
  (type == WeightType::f32    ? multiply_typed<float, Job>
   : type == WeightType::bf16 ? multiply_typed<uint16_t, Job>
                              : multiply_typed<int8_t, Job>)(job, stream);
}

}  // namespace cuda
}  // namespace samoe
