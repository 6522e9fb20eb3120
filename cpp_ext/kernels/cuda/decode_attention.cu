// Inference: attention of new tokens over a paged cache; meanings as in kernels/cpu/simd/decode_attention.cpp. A block
// attends for one token's queries of one key-value head, over chunks of kChunk positions whose results are joined in order
// (online softmax). Where there is room for them, chunks are blocks of their own, so that few long sequences fill the GPU.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

using cpu::kPage;

constexpr int kChunk = 256;    // positions
constexpr int kQueries = 4;    // queries that share a reading of keys and values
constexpr int kPerLane = 2;    // scores of a page that a lane ends with
static_assert(kQueries * kPage == kWarp * kPerLane, "a warp scores a page");

SAMOE_DEVICE int64_t page_of(const cpu::DecodeAttention& a, const CacheBounds& bounds, int64_t t, int64_t position) {
  const int64_t page = a.pages[a.slots_T[t] * a.pages_per_slot + position / kPage];
  assert(page >= 0 && page < bounds.num_pages);
  return page;
}

SAMOE_DEVICE void normalise_head(const float* x, const float* weight, const float* bias, const cpu::DecodeAttention& a,
                                 float* out) {
  const float size = static_cast<float>(a.head_dim);
  float sum = 0.0f, squares = 0.0f;
  if (!a.rms) {
    for (int64_t d = lane_of_thread(); d < a.head_dim; d += kWarp) sum += x[d];
  }
  const float mean = warp_sum(sum) / size;
  for (int64_t d = lane_of_thread(); d < a.head_dim; d += kWarp) squares += (x[d] - mean) * (x[d] - mean);
  const float inverse = 1.0f / sqrtf(warp_sum(squares) / size + a.epsilon);
  for (int64_t d = lane_of_thread(); d < a.head_dim; d += kWarp) {
    const float y = (x[d] - mean) * inverse * weight[d];
    out[d] = bias == nullptr ? y : y + bias[d];
  }
}

// A warp a head: norm and rotation, and a key or a value into the cache.
template <typename C>
__global__ void prepare_heads(cpu::DecodeAttention a, CacheBounds bounds) {
  const int64_t heads = a.queries_per_kv + 2, row = global_warp(), D = a.head_dim;
  if (row >= a.num_tokens * a.kv_heads * heads) return;
  const int64_t t = row / (a.kv_heads * heads), g = row / heads % a.kv_heads, h = row % heads;
  const int64_t position = a.positions_T[t];
  assert(a.slots_T[t] >= 0 && a.slots_T[t] < bounds.num_slots);
  assert(position >= 0 && position < a.pages_per_slot * kPage);
  const bool is_key = h == heads - 2, is_value = h == heads - 1;
  const float* source = a.qkv + row * D;
  float* head = a.qkv_scratch + row * D;
  const float* norm = is_key ? a.k_norm_D : a.q_norm_D;
  if (is_value || norm == nullptr) {
    for (int64_t d = lane_of_thread(); d < D; d += kWarp) head[d] = source[d];
  } else {
    normalise_head(source, norm, is_key ? a.k_norm_bias_D : a.q_norm_bias_D, a, head);
  }
  __syncwarp();
  if (!is_value && a.cos_PR != nullptr) {
    assert(position < bounds.num_angles);
    const float *cosine = a.cos_PR + position * a.rotated, *sine = a.sin_PR + position * a.rotated;
    const int64_t half = a.rotated / 2;
    for (int64_t i = lane_of_thread(); i < half; i += kWarp) {
      const float first = head[i], second = head[half + i];
      head[i] = first * cosine[i] - second * sine[i];
      head[half + i] = second * cosine[half + i] + first * sine[half + i];
    }
    __syncwarp();
  }
  if (!is_key && !is_value) return;
  const int64_t base = (page_of(a, bounds, t, position) * a.kv_heads + g) * D * kPage, place = position % kPage;
  C* keys = static_cast<C*>(a.keys) + base;
  C* values = static_cast<C*>(a.values) + base + place * D;
  for (int64_t d = lane_of_thread(); d < D; d += kWarp) {
    if (is_key) {
      keys[d * kPage + place] = from_float<C>(head[d]);
    } else {
      values[d] = from_float<C>(head[d]);
    }
  }
}

// One query over some positions: the peak of the scores, the sum of exp(score - peak), and one channel of the values
// weighted with these. Parts are joined in the order of positions, by the same instructions wherever they were made.
struct Part {
  float peak = -INFINITY, sum = 0.0f, total = 0.0f;
};

SAMOE_DEVICE Part join(const Part& before, const Part& next) {
  const float peak = next.peak > before.peak ? next.peak : before.peak;
  const float old_share = expf(before.peak - peak), new_share = expf(next.peak - peak);
  return {peak, fmaf(next.sum, new_share, before.sum * old_share), fmaf(next.total, new_share, before.total * old_share)};
}

struct Chunk {
  float queries[kQueries][kMaxHeadDim];
  float weights[kQueries][kChunk];  // first the scores
  float peaks[kQueries], sums[kQueries];
};

// Where a block works: a token, a key-value head, `count` queries from q on, positions first .. first + length - 1.
struct Place {
  int64_t t, g, q, first;
  int count, length;
};

// A warp a page. Its lanes share the channels: each takes V positions of every (2 * V)th channel.
template <typename C, int V>
SAMOE_DEVICE void score(const cpu::DecodeAttention& a, const CacheBounds& bounds, const Place& place, Chunk& chunk) {
  constexpr int kLanes = kPage / V;  // of one channel
  const int64_t D = a.head_dim;
  const int part = lane_of_thread() % kLanes * V;
  const float scale = 1.0f / sqrtf(static_cast<float>(D));
  for (int start = warp_of_thread() * kPage; start < place.length; start += kWarps * kPage) {
    const int64_t page = page_of(a, bounds, place.t, place.first + start);
    const C* keys = static_cast<const C*>(a.keys) + (page * a.kv_heads + place.g) * D * kPage + part;
    float sums[kQueries * V] = {};
    for (int64_t d = lane_of_thread() / kLanes; d < D; d += kWarp / kLanes) {
      const Pack<C, V> key = load<V>(keys + d * kPage);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        if (q >= place.count) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sums[q * V + v] += chunk.queries[q][d] * to_float(key.at[v]);
      }
    }
    const int first = sum_scattered<kQueries * V, kPerLane>(sums);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) chunk.weights[(first + i) / V][start + part + (first + i) % V] = sums[i] * scale;
  }
}

// A warp a query: scores become their exponentials.
SAMOE_DEVICE void exponentiate(const Place& place, Chunk& chunk) {
  const int q = warp_of_thread();
  if (q >= place.count) return;
  float* weights = chunk.weights[q];
  float peak = -INFINITY, sum = 0.0f;
  for (int p = lane_of_thread(); p < place.length; p += kWarp) peak = weights[p] > peak ? weights[p] : peak;
  peak = warp_max(peak);
  for (int p = lane_of_thread(); p < place.length; p += kWarp) {
    weights[p] = expf(weights[p] - peak);
    sum += weights[p];
  }
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) {
    chunk.peaks[q] = peak;
    chunk.sums[q] = sum;
  }
}

// Threads share positions and channels, V of these; then thread d has the sum of channel d of each query.
template <typename C, int V>
SAMOE_DEVICE void add_values(const cpu::DecodeAttention& a, const CacheBounds& bounds, const Place& place,
                             const Chunk& chunk, float (&totals)[kQueries]) {
  __shared__ float gathered[kThreads * V];
  const int D = static_cast<int>(a.head_dim), groups = D / V, num_rows = kThreads / groups;
  const int thread = static_cast<int>(threadIdx.x), row = thread / groups, channel = thread % groups * V;
  float sums[kQueries][V] = {};
  for (int p = row; row < num_rows && p < place.length; p += num_rows) {
    const int64_t page = page_of(a, bounds, place.t, place.first + p);
    const C* values = static_cast<const C*>(a.values) + (page * a.kv_heads + place.g) * D * kPage;
    const Pack<C, V> value = load<V>(values + p % kPage * D + channel);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      if (q >= place.count) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) sums[q][v] += chunk.weights[q][p] * to_float(value.at[v]);
    }
  }
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    if (q >= place.count) continue;
    __syncthreads();
    if (row < num_rows) {
      for (int v = 0; v < V; ++v) gathered[row * D + channel + v] = sums[q][v];
    }
    __syncthreads();
    totals[q] = 0.0f;
    for (int r = 0; thread < D && r < num_rows; ++r) totals[q] += gathered[r * D + thread];
  }
}

// parts_of_grid: 0, and a block takes all chunks and writes the result; else it takes one of that many, and writes its part
// as channels, peak and sum.
template <typename C, int V>
__global__ void __launch_bounds__(kThreads, 2) attend(cpu::DecodeAttention a, CacheBounds bounds, int64_t parts_of_grid, float* parts) {
  __shared__ Chunk chunk;
  const int64_t D = a.head_dim, Q = a.queries_per_kv, divisor = parts_of_grid == 0 ? 1 : parts_of_grid;
  const int64_t head = blockIdx.x / divisor, own = blockIdx.x % divisor, t = head / a.kv_heads;
  const int64_t positions = a.positions_T[t] + 1, chunks = (positions + kChunk - 1) / kChunk;
  const int64_t first_chunk = parts_of_grid == 0 ? 0 : own, last_chunk = parts_of_grid == 0 ? chunks : own + 1;
  if (first_chunk >= chunks) return;
  const float* queries = a.qkv_scratch + head * (Q + 2) * D;
  for (int64_t q = 0; q < Q; q += kQueries) {
    const int count = static_cast<int>(Q - q < kQueries ? Q - q : kQueries);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count * D; i += kThreads) chunk.queries[i / D][i % D] = queries[q * D + i];
    Part joined[kQueries];
    for (int64_t c = first_chunk; c < last_chunk; ++c) {
      const int64_t first = c * kChunk, left = positions - first;
      const Place place = {t, head % a.kv_heads, q, first, count, static_cast<int>(left < kChunk ? left : kChunk)};
      __syncthreads();
      score<C, V>(a, bounds, place, chunk);
      __syncthreads();
      exponentiate(place, chunk);
      __syncthreads();
      float totals[kQueries];
      add_values<C, V>(a, bounds, place, chunk, totals);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (i < count) joined[i] = join(joined[i], {chunk.peaks[i], chunk.sums[i], totals[i]});
      }
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= count) continue;
      const int64_t row = head * Q + q + i;
      if (parts_of_grid == 0) {
        if (threadIdx.x < D) a.out[row * D + threadIdx.x] = joined[i].total / joined[i].sum;
        continue;
      }
      float* part = parts + (row * parts_of_grid + own) * (D + 2);
      if (threadIdx.x < D) part[threadIdx.x] = joined[i].total;
      if (threadIdx.x == 0) part[D] = joined[i].peak;
      if (threadIdx.x == 0) part[D + 1] = joined[i].sum;
    }
  }
}

// A thread a channel of a query.
__global__ void join_parts(cpu::DecodeAttention a, int64_t parts_of_grid, const float* parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, D = a.head_dim;
  const int64_t heads = a.kv_heads * a.queries_per_kv;
  if (i >= a.num_tokens * heads * D) return;
  const int64_t chunks = a.positions_T[i / (heads * D)] / kChunk + 1;
  Part joined;
  for (int64_t c = 0; c < chunks; ++c) {
    const float* part = parts + (i / D * parts_of_grid + c) * (D + 2);
    joined = join(joined, {part[D], part[D + 1], part[i % D]});
  }
  a.out[i] = joined.total / joined.sum;
}

template <typename C>
void attention_typed(const cpu::DecodeAttention& a, const CacheBounds& bounds, float* room, int64_t num_room,
                     cudaStream_t stream) {
  const int64_t heads = a.num_tokens * a.kv_heads;
  launch(prepare_heads<C>, ceil_div(heads * (a.queries_per_kv + 2), kWarps), stream, a, bounds);
  const bool wide = is_wide<C>(a.head_dim, a.keys, a.values);
  const auto kernel = wide ? attend<C, kWide<C>> : attend<C, 1>;
  const int64_t parts = ceil_div(a.pages_per_slot * kPage, kChunk);
  const bool is_split = parts > 1 && heads * a.queries_per_kv * parts * (a.head_dim + 2) <= num_room;
  launch(kernel, heads * (is_split ? parts : 1), stream, a, bounds, is_split ? parts : 0, room);
  if (!is_split) return;
  launch(join_parts, ceil_div(heads * a.queries_per_kv * a.head_dim, kThreads), stream, a, parts, room);
}

}  // namespace

void decode_attention(const cpu::DecodeAttention& a, const CacheBounds& bounds, float* room, int64_t num_room,
                      cudaStream_t stream) {
  (a.cache_is_bf16 ? attention_typed<uint16_t> : attention_typed<float>)(a, bounds, room, num_room, stream);
}

}  // namespace cuda
}  // namespace samoe
