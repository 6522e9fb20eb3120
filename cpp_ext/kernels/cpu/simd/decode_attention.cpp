// Inference: attention of new tokens over a paged cache.
#include "../../kernels.h"
#include "decode_team.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kParts = kPage / kLanes;  // vectors of one page's scores
constexpr int kTile = static_cast<int>(8 / kParts);            // sums of scores side by side, of kParts vectors
constexpr int kValueRows = SAMOE_VECTOR_BYTES == 64 ? 4 : 2;   // queries whose values are summed side by side
constexpr int64_t kBlockQueries = 16;                          // queries that read keys and values together
constexpr int64_t kMostCompared = 64;                          // tokens whose sequences are compared with each other

SAMOE_INLINE void store_one(float* p, float value) { *p = value; }
SAMOE_INLINE void store_one(uint16_t* p, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

int64_t page_of(const DecodeAttention& a, int64_t t, int64_t block) {
  return a.pages[a.slots_T[t] * a.pages_per_slot + block];
}

void rotate(const DecodeAttention& a, int64_t position, float* head) {
  const float* cosine = a.cos_PR + position * a.rotated;
  const float* sine = a.sin_PR + position * a.rotated;
  const int64_t half = a.rotated / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cosine[i] - second * sine[i];
    head[half + i] = second * cosine[half + i] + first * sine[half + i];
  }
}

// Norm and rotation of one token's heads in one group, and its key and value into the cache.
template <typename C>
void prepare(const DecodeAttention& a, int64_t t, int64_t g) {
  const int64_t D = a.head_dim, heads = a.queries_per_kv + 2, position = a.positions_T[t];
  const float* source = a.qkv + (t * a.kv_heads + g) * heads * D;
  float* target = a.qkv_scratch + (t * a.kv_heads + g) * heads * D;
  for (int64_t h = 0; h < heads; ++h) {
    float* head = target + h * D;
    const bool is_key = h == heads - 2, is_value = h == heads - 1;
    const float* norm = is_key ? a.k_norm_D : a.q_norm_D;
    if (is_value || norm == nullptr) {
      memcpy(head, source + h * D, static_cast<size_t>(D) * sizeof(float));
    } else {
      normalise(source + h * D, norm, is_key ? a.k_norm_bias_D : a.q_norm_bias_D, a.epsilon, a.rms, D, head);
    }
    if (!is_value && a.cos_PR != nullptr) rotate(a, position, head);
  }
  const int64_t base = (page_of(a, t, position / kPage) * a.kv_heads + g) * D * kPage, place = position % kPage;
  C* keys = static_cast<C*>(a.keys) + base;
  C* values = static_cast<C*>(a.values) + base + place * D;
  const float* key = target + (heads - 2) * D;
  const float* value = target + (heads - 1) * D;
  for (int64_t d = 0; d < D; ++d) store_one(keys + d * kPage + place, key[d]);
  for (int64_t d = 0; d < D; ++d) store_one(values + d, value[d]);
}

// Scores of M queries with P pages of keys. Every score is one sum over the channels in their order: kTile sums side by side
// hide the latency of one, over the queries of a prompt, or over pages where there is one query.
template <int M, int P, typename C>
SAMOE_INLINE void score_tile(const float* const* queries, const C* const* pages, int64_t D, float scale, float* const* scores,
                             int64_t page) {
  vf sums[M][P][kParts] = {};
  for (int64_t d = 0; d < D; ++d) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kParts; ++i) {
        const vf key = load(pages[page + p] + d * kPage + i * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][p][i] = fused(splat(queries[m][d]), key, sums[m][p][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kParts; ++i)
        store(scores[m] + (page + p) * kPage + i * kLanes, sums[m][p][i] * scale);
}

// Scores of M queries with pages from one on, as many pages at a time as are left.
template <int M, int P, typename C>
SAMOE_INLINE void score_pages(const float* const* queries, const C* const* pages, int64_t page, int64_t num_pages, int64_t D,
                              float scale, float* const* scores) {
  for (; page + P <= num_pages; page += P) score_tile<M, P>(queries, pages, D, scale, scores, page);
  if constexpr (P > 1) score_pages<M, P / 2>(queries, pages, page, num_pages, D, scale, scores);
}

// Scores of queries with all pages, as many queries at a time as are left.
template <int M, typename C>
SAMOE_INLINE void score(const float* const* queries, int64_t num_queries, const C* const* pages, int64_t num_pages,
                        int64_t D, float scale, float* const* scores) {
  int64_t q = 0;
  for (; q + M <= num_queries; q += M) score_pages<M, kTile / M>(queries + q, pages, 0, num_pages, D, scale, scores + q);
  if constexpr (M > 1) score<M / 2>(queries + q, num_queries - q, pages, num_pages, D, scale, scores + q);
}

// Turns scores into their exponentials and returns one over the sum. Scores after the last position become 0.
SAMOE_INLINE float softmax(float* scores, int64_t length, int64_t padded) {
  for (int64_t i = length; i < padded; ++i) scores[i] = -__builtin_inff();
  float peak;
  return 1.0f / exponentials(scores, padded, scores, &peak);
}

// Adds a page's values, weighted, to V vectors of M queries' channels; one may be a part.
template <int M, int V, typename C>
SAMOE_INLINE void value_tile(const C* values, const float* const* weights, int64_t first, int64_t count, int64_t D, int64_t d,
                             float* const* out) {
  const int64_t left = D - d;
  vf sums[M][V];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][v] = V == 1 ? load_part(out[m] + d, left) : load(out[m] + d + v * kLanes);
  for (int64_t p = 0; p < count; ++p) {
    const C* row = values + p * D + d;
    vf value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = V == 1 ? load_part(row, left) : load(row + v * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vf w = splat(weights[m][first + p]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = fused(w, value[v], sums[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_part(out[m] + d + v * kLanes, sums[m][v], V == 1 ? left : kLanes);
}

template <int M, typename C>
SAMOE_INLINE void add_values(const C* values, const float* const* weights, int64_t num_queries, int64_t first, int64_t count,
                             int64_t D, float* const* out) {
  int64_t q = 0;
  for (; q + M <= num_queries; q += M) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) value_tile<M, 4>(values, weights + q, first, count, D, d, out + q);
    for (; d < D; d += kLanes) value_tile<M, 1>(values, weights + q, first, count, D, d, out + q);
  }
  if constexpr (M > 1) add_values<1>(values, weights + q, num_queries - q, first, count, D, out + q);
}

// Consecutive tokens of one sequence, whose queries share the keys and values that they read.
struct Block {
  int64_t first, count;
};

int64_t block_tokens(const DecodeAttention& a) { return kBlockQueries / a.queries_per_kv > 1 ? kBlockQueries / a.queries_per_kv : 1; }

int64_t make_blocks(const DecodeAttention& a, Block* blocks) {
  int64_t num = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const bool joins = num > 0 && blocks[num - 1].count < block_tokens(a) && a.slots_T[t] == a.slots_T[t - 1];
    if (joins) {
      ++blocks[num - 1].count;
    } else {
      blocks[num++] = {t, 1};
    }
  }
  return num;
}

// Positions that a block's tokens see.
int64_t seen_by(const DecodeAttention& a, const Block& block) {
  int64_t length = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t own = a.positions_T[block.first + i] + 1;
    length = own > length ? own : length;
  }
  return length;
}

// Asks for a group's first pages: pages lie anywhere, so the processor foresees none of them.
template <typename C>
void ask_for_pages(const DecodeAttention& a, const Block& block, int64_t g) {
  const int64_t size = a.head_dim * kPage * static_cast<int64_t>(sizeof(C));
  const int64_t seen = (seen_by(a, block) + kPage - 1) / kPage, most = kAheadBytes / size, num_pages = seen < most ? seen : most;
  const auto ask_for = [&](const void* cache) {
    for (int64_t p = 0; p < num_pages; ++p) {
      const char* page = static_cast<const char*>(cache) + (page_of(a, block.first, p) * a.kv_heads + g) * size;
      for (int64_t i = 0; i < size; i += kLineBytes) __builtin_prefetch(page + i, 0, 3);
    }
  };
  ask_for(a.keys);
  ask_for(a.values);
}

// Whether each token is of another sequence, so that nobody waits for the keys of others.
bool each_is_alone(const DecodeAttention& a) {
  if (a.num_tokens > kMostCompared) return false;
  for (int64_t t = 0; t < a.num_tokens; ++t)
    for (int64_t other = 0; other < t; ++other)
      if (a.slots_T[t] == a.slots_T[other]) return false;
  return true;
}

// Memory of one thread: pages of a block's sequence, and scores, whole pages of every query.
struct AttentionWork {
  const void** pages;
  const float** queries;
  float **rows, **out, *scores;
};

// The queries of a block's tokens in one group, over their sequence.
template <typename C>
void attend(const DecodeAttention& a, const Block& block, int64_t g, const AttentionWork& work) {
  const int64_t D = a.head_dim, Q = a.queries_per_kv, num = block.count * Q, length = seen_by(a, block);
  const int64_t num_pages = (length + kPage - 1) / kPage, padded = num_pages * kPage;
  for (int64_t q = 0; q < num; ++q) {
    const int64_t t = block.first + q / Q;
    work.queries[q] = a.qkv_scratch + ((t * a.kv_heads + g) * (Q + 2) + q % Q) * D;
    work.out[q] = a.out + ((t * a.kv_heads + g) * Q + q % Q) * D;
    work.rows[q] = work.scores + q * padded;
  }
  const C** pages = reinterpret_cast<const C**>(work.pages);
  const auto find = [&](const void* cache) {
    for (int64_t p = 0; p < num_pages; ++p)
      pages[p] = static_cast<const C*>(cache) + (page_of(a, block.first, p) * a.kv_heads + g) * D * kPage;
  };
  find(a.keys);
  score<kTile>(work.queries, num, pages, num_pages, D, 1.0f / __builtin_sqrtf(static_cast<float>(D)), work.rows);
  for (int64_t q = 0; q < num; ++q) {
    float* row = work.rows[q];
    const float share = softmax(row, a.positions_T[block.first + q / Q] + 1, padded);
    for (int64_t i = 0; i < padded; i += kLanes) store(row + i, load(row + i) * share);
    memset(work.out[q], 0, static_cast<size_t>(D) * sizeof(float));
  }
  find(a.values);
  for (int64_t p = 0; p < num_pages; ++p) {
    const int64_t left = length - p * kPage;
    add_values<kValueRows>(pages[p], work.rows, num, p * kPage, left < kPage ? left : kPage, D, work.out);
  }
}

template <typename C>
void run(Member& member, const DecodeAttention& a, const PackedRows* packed) {
  static thread_local ThreadMemory memory;
  int64_t longest = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t) longest = a.positions_T[t] > longest ? a.positions_T[t] : longest;
  const int64_t num_pages = longest / kPage + 1, rows = block_tokens(a) * a.queries_per_kv, size = sizeof(void*);
  char* next = static_cast<char*>(memory.bytes(a.num_tokens * static_cast<int64_t>(sizeof(Block)) +
                                               (num_pages + 3 * rows) * size + rows * num_pages * kPage * 4));
  const auto take = [&](int64_t bytes) { return next += bytes, next - bytes; };
  Block* blocks = reinterpret_cast<Block*>(take(a.num_tokens * static_cast<int64_t>(sizeof(Block))));
  AttentionWork work;
  work.pages = reinterpret_cast<const void**>(take(num_pages * size));
  work.queries = reinterpret_cast<const float**>(take(rows * size));
  work.rows = reinterpret_cast<float**>(take(rows * size));
  work.out = reinterpret_cast<float**>(take(rows * size));
  work.scores = reinterpret_cast<float*>(next);
  const int64_t num_blocks = make_blocks(a, blocks), num_tasks = num_blocks * a.kv_heads;
  const int64_t fair = (num_tasks + member.size() - 1) / member.size();
  const int64_t chunk = fair < 1 ? 1 : (fair < a.kv_heads ? fair : a.kv_heads);  // a page's groups lie side by side
  const auto ask_for = [&](int64_t item) {
    if (item < num_tasks) ask_for_pages<C>(a, blocks[item / a.kv_heads], item % a.kv_heads);
  };
  const int64_t num_chunks = (num_tasks + chunk - 1) / chunk;
  ask_for(member.next_task(num_chunks) * chunk);
  const bool is_alone = each_is_alone(a), packs = packed != nullptr && packed->takes_parts(attention_part(a));
  if (!is_alone) {
    member.own(a.num_tokens * a.kv_heads, [&](int64_t i) { prepare<C>(a, i / a.kv_heads, i % a.kv_heads); });
    member.wait();
  }
  const auto attend_chunk = [&](int64_t task, int64_t after) {
    const int64_t end = (task + 1) * chunk < num_tasks ? (task + 1) * chunk : num_tasks;
    for (int64_t i = task * chunk; i < end; ++i) {
      const Block& block = blocks[i / a.kv_heads];
      ask_for(i + 1 < end ? i + 1 : after * chunk);
      if (is_alone) prepare<C>(a, block.first, i % a.kv_heads);
      attend<C>(a, block, i % a.kv_heads, work);
      if (!packs) continue;
      const int64_t size = attention_part(a);
      for (int64_t t = block.first; t < block.first + block.count; ++t) packed->pack_part(t, i % a.kv_heads * size, size);
    }
  };
  member.tasks(num_chunks, attend_chunk);
}

}  // namespace

void attention_tasks(Member& member, const DecodeAttention& a, const PackedRows* packed) {
  if (a.cache_is_bf16) {
    run<uint16_t>(member, a, packed);
  } else {
    run<float>(member, a, packed);
  }
}

void decode_attention(const DecodeAttention& a) {
  run_team(a.num_threads, [&](Member& member) { attention_tasks(member, a, nullptr); });
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
