// Inference: the MLPs of chosen experts; meanings as in kernels/cpu/simd/decode_experts.cpp. Slots (t, k) are sorted by
// expert on the device, and every expert that some token chose is read once for each kTile of its tokens. How many experts
// are hit is known on the device alone: the grids have room for the most, and blocks without work end at once.
#include "decode_product.cuh"

namespace samoe {
namespace cuda {
namespace {

struct ExpertTile {
  int32_t expert, first, count;
};

// Slots by expert, in order, and the tiles that they make.
struct ExpertPlan {
  int32_t* num_tiles;
  int32_t* slots_N;
  ExpertTile* tiles;
};

int64_t most_tiles(const cpu::DecodeExperts& a) {
  const int64_t slots = a.num_tokens * a.topk, hit = slots < a.num_experts ? slots : a.num_experts;
  return (slots + (kTile - 1) * hit) / kTile;
}

// Slots start .. start + 31 that chose an expert, as bits.
SAMOE_DEVICE unsigned slots_of_expert(const cpu::DecodeExperts& a, int64_t num_slots, int64_t start, int64_t expert) {
  const int64_t slot = start + lane_of_thread();
  return __ballot_sync(kAllLanes, slot < num_slots && a.ids_TK[slot] == expert);
}

// One block. In rounds of kThreads experts: warps count the slots of an expert each, all threads sum up what lies before
// theirs, and warps write the slots.
__global__ void plan_experts(cpu::DecodeExperts a, int64_t num_w1, int64_t num_w2, ExpertPlan plan) {
  __shared__ int rows[kThreads], tiles[kThreads], starts[kThreads];
  const int lane = lane_of_thread(), thread = static_cast<int>(threadIdx.x);
  const int64_t num_slots = a.num_tokens * a.topk;
  for (int64_t slot = thread; slot < num_slots; slot += kThreads)
    assert(a.ids_TK[slot] >= -1 && a.ids_TK[slot] < a.num_experts);
  int rows_before = 0, tiles_before = 0;
  for (int64_t first = 0; first < a.num_experts; first += kThreads) {
    for (int i = warp_of_thread(); i < kThreads; i += kWarps) {
      const int64_t expert = first + i;
      int count = 0;
      if (expert < a.num_experts && a.index1_E[expert] >= 0) {
        for (int64_t start = 0; start < num_slots; start += kWarp)
          count += __popc(slots_of_expert(a, num_slots, start, expert));
      }
      if (lane == 0) {
        rows[i] = count;
        tiles[i] = (count + kTile - 1) / kTile;
      }
    }
    __syncthreads();
    const int own_rows = rows[thread], own_tiles = tiles[thread];
    for (int step = 1; step < kThreads; step *= 2) {
      const int earlier_rows = thread >= step ? rows[thread - step] : 0;
      const int earlier_tiles = thread >= step ? tiles[thread - step] : 0;
      __syncthreads();
      rows[thread] += earlier_rows;
      tiles[thread] += earlier_tiles;
      __syncthreads();
    }
    const int start = rows_before + rows[thread] - own_rows;
    starts[thread] = start;
    if (own_rows > 0) {
      const int64_t expert = first + thread;
      assert(a.index1_E[expert] < num_w1 && a.index2_E[expert] >= 0 && a.index2_E[expert] < num_w2);
      ExpertTile* next = plan.tiles + tiles_before + tiles[thread] - own_tiles;
      for (int done = 0; done < own_rows; done += kTile) {
        const int left = own_rows - done;
        *next++ = {static_cast<int32_t>(expert), start + done, left < kTile ? left : kTile};
      }
    }
    __syncthreads();
    for (int i = warp_of_thread(); i < kThreads; i += kWarps) {
      const int end = rows_before + rows[i];
      int place = starts[i];
      for (int64_t from = 0; place < end; from += kWarp) {
        const unsigned hits = slots_of_expert(a, num_slots, from, first + i);
        const unsigned before = hits & ((1u << lane) - 1u);
        if (hits >> lane & 1u) plan.slots_N[place + __popc(before)] = static_cast<int32_t>(from + lane);
        place += __popc(hits);
      }
    }
    rows_before += rows[kThreads - 1];
    tiles_before += tiles[kThreads - 1];
    __syncthreads();
  }
  if (thread == 0) *plan.num_tiles = tiles_before;
}

SAMOE_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
SAMOE_DEVICE float gelu(float x) { return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

// What both products share.
struct ExpertJob {
  Product p;
  cpu::DecodeExperts a;
  ExpertPlan plan;

  __device__ ProductTile tile(int64_t i) const {
    if (i >= *plan.num_tiles) return {0, 0, 0};
    const ExpertTile found = plan.tiles[i];
    return {found.expert, found.first, found.count};
  }
  __device__ int64_t slot(const ProductTile& tile, int t) const { return plan.slots_N[tile.first + t]; }
};

// h[slot] = activation of w1 x + b1. Gated, half of a unit's rows are gates and half the rows that go through them.
struct FirstJob : ExpertJob {
  __device__ int columns() const { return a.gated ? kRows / 2 : kRows; }
  __device__ int64_t row(const ProductTile& tile, int64_t unit, int r) const {
    const int64_t f = unit * columns() + r % columns(), within = f < a.ffn ? f : a.ffn - 1;
    return a.index1_E[tile.expert] * (a.gated ? 2 * a.ffn : a.ffn) + (r < columns() ? 0 : a.ffn) + within;
  }
  __device__ int64_t source(const ProductTile& tile, int t) const { return slot(tile, t) / a.topk; }
  __device__ void finish(const ProductTile& tile, int64_t unit, int r, int t, float sum) const {
    const int64_t n = row(tile, unit, r), f = unit * columns() + r % columns();
    if (a.w1.scale != nullptr) sum *= a.w1.scale[n];
    if (a.b1 != nullptr) sum += a.b1[n];
    if (a.factor1_E != nullptr) sum *= a.factor1_E[tile.expert];
    float result;
    if (a.gated) {
      const float up = __shfl_xor_sync(kAllLanes, sum, kWarp / 2);
      if (r >= columns()) return;
      result = silu(sum) * up;
    } else {
      result = gelu(sum);
    }
    if (t < tile.count && f < a.ffn) a.h_NF[slot(tile, t) * a.ffn + f] = result;
  }
};

// y[slot] = w2 h + b2.
struct SecondJob : ExpertJob {
  __device__ int64_t row(const ProductTile& tile, int64_t unit, int r) const {
    const int64_t n = unit * kRows + r;
    return a.index2_E[tile.expert] * a.hidden + (n < a.hidden ? n : a.hidden - 1);
  }
  __device__ int64_t source(const ProductTile& tile, int t) const { return slot(tile, t); }
  __device__ void finish(const ProductTile& tile, int64_t unit, int r, int t, float sum) const {
    const int64_t n = row(tile, unit, r), column = unit * kRows + r;
    if (a.w2.scale != nullptr) sum *= a.w2.scale[n];
    if (a.b2 != nullptr) sum += a.b2[n];
    if (a.factor2_E != nullptr) sum *= a.factor2_E[tile.expert];
    if (t < tile.count && column < a.hidden) a.y_NH[slot(tile, t) * a.hidden + column] = sum;
  }
};

__global__ void add_results(cpu::DecodeExperts a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.num_tokens * a.hidden) return;
  const int64_t t = i / a.hidden, h = i % a.hidden;
  float sum = a.out_TH[i];
  for (int64_t slot = t * a.topk; slot < (t + 1) * a.topk; ++slot)
    if (a.ids_TK[slot] >= 0) sum += a.probs_TK[slot] * a.y_NH[slot * a.hidden + h];
  a.out_TH[i] = sum;
}

__global__ void choose_only_kernel(int64_t num_tokens, int64_t* ids_T, float* probs_T) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= num_tokens) return;
  ids_T[t] = 0;
  probs_T[t] = 1.0f;
}

}  // namespace

int64_t decode_experts_workspace_bytes(const cpu::DecodeExperts& a) {
  const int64_t integers = 1 + a.num_tokens * a.topk;
  return integers * static_cast<int64_t>(sizeof(int32_t)) + most_tiles(a) * static_cast<int64_t>(sizeof(ExpertTile));
}

void decode_experts(const cpu::DecodeExperts& a, int64_t num_w1, int64_t num_w2, void* workspace, cudaStream_t stream) {
  int32_t* integers = static_cast<int32_t*>(workspace);
  ExpertTile* tiles = reinterpret_cast<ExpertTile*>(integers + 1 + a.num_tokens * a.topk);
  const ExpertPlan plan = {integers, integers + 1, tiles};
  const int64_t num_tiles = most_tiles(a), num_units1 = ceil_div(a.ffn, a.gated ? kRows / 2 : kRows);
  if (num_tiles > 0) {
    launch(plan_experts, 1, stream, a, num_w1, num_w2, plan);
    multiply(a.w1.type, FirstJob{{{a.w1.data, a.x_TH, a.hidden, num_tiles, num_units1}, a, plan}}, stream);
    multiply(a.w2.type, SecondJob{{{a.w2.data, a.h_NF, a.ffn, num_tiles, ceil_div(a.hidden, kRows)}, a, plan}}, stream);
  }
  if (a.combine) launch(add_results, ceil_div(a.num_tokens * a.hidden, kThreads), stream, a);
}

void choose_only_expert(int64_t num_tokens, int64_t* ids_T, float* probs_T, cudaStream_t stream) {
  launch(choose_only_kernel, ceil_div(num_tokens, kThreads), stream, num_tokens, ids_T, probs_T);
}

}  // namespace cuda
}  // namespace samoe
