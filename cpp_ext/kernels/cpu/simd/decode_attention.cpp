// Inference: attention of new tokens over a paged cache.
#include "../../kernels.h"
#include "decode_team.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kParts = kPage / kLanes;  // vectors of one page's scores

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

// Scores of one query with a page of keys. The next group's keys of the page are asked for meanwhile: they follow.
template <typename C>
SAMOE_INLINE void score_page(const float* query, const C* keys, int64_t D, float scale, float* scores) {
  vf sums[kParts] = {};
  for (int64_t d = 0; d < D; ++d) {
    __builtin_prefetch(keys + (D + d) * kPage);
    const vf q = splat(query[d]);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kParts; ++i) sums[i] += q * load(keys + d * kPage + i * kLanes);
  }
  for (int64_t i = 0; i < kParts; ++i) store(scores + i * kLanes, sums[i] * scale);
}

// Turns scores into their exponentials and returns one over the sum. Scores after the last position become 0.
SAMOE_INLINE float softmax(float* scores, int64_t length, int64_t padded) {
  for (int64_t i = length; i < padded; ++i) scores[i] = -__builtin_inff();
  float peak;
  return 1.0f / exponentials(scores, padded, scores, &peak);
}

// Adds a page's values, weighted, to four vectors of channels from d on (fewer at the end of a head).
template <typename C>
SAMOE_INLINE void add_values(const C* values, const float* weights, int64_t count, int64_t D, float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
    vf sums[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) sums[i] = load(out + d + i * kLanes);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = 0; i < 4 * kLanes; i += 64 / static_cast<int64_t>(sizeof(C)))
        __builtin_prefetch(values + (kPage + p) * D + d + i);
      const vf w = splat(weights[p]);
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) sums[i] += w * load(values + p * D + d + i * kLanes);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) store(out + d + i * kLanes, sums[i]);
  }
  for (; d < D; d += kLanes) {
    const int64_t n = D - d < kLanes ? D - d : kLanes;
    vf sum = load_part(out + d, n);
    for (int64_t p = 0; p < count; ++p) sum += splat(weights[p]) * load_part(values + p * D + d, n);
    store_part(out + d, sum, n);
  }
}

// One token's queries of one group over its sequence. scores: room for whole pages of every query.
template <typename C>
void attend(const DecodeAttention& a, int64_t t, int64_t g, float* scores) {
  const int64_t D = a.head_dim, Q = a.queries_per_kv, length = a.positions_T[t] + 1;
  const int64_t num_pages = (length + kPage - 1) / kPage, padded = num_pages * kPage;
  const float* queries = a.qkv_scratch + (t * a.kv_heads + g) * (Q + 2) * D;
  float* out = a.out + (t * a.kv_heads + g) * Q * D;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
  for (int64_t block = 0; block < num_pages; ++block) {
    const C* keys = static_cast<const C*>(a.keys) + (page_of(a, t, block) * a.kv_heads + g) * D * kPage;
    for (int64_t q = 0; q < Q; ++q) score_page(queries + q * D, keys, D, scale, scores + q * padded + block * kPage);
  }
  memset(out, 0, static_cast<size_t>(Q * D) * sizeof(float));
  for (int64_t q = 0; q < Q; ++q) {
    const float share = softmax(scores + q * padded, length, padded);
    for (int64_t i = 0; i < padded; i += kLanes) store(scores + q * padded + i, load(scores + q * padded + i) * share);
  }
  for (int64_t block = 0; block < num_pages; ++block) {
    const C* values = static_cast<const C*>(a.values) + (page_of(a, t, block) * a.kv_heads + g) * D * kPage;
    const int64_t left = length - block * kPage, count = left < kPage ? left : kPage;
    for (int64_t q = 0; q < Q; ++q)
      add_values(values, scores + q * padded + block * kPage, count, D, out + q * D);
  }
}

template <typename C>
void run(Member& member, const DecodeAttention& a) {
  int64_t longest = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t) longest = a.positions_T[t] > longest ? a.positions_T[t] : longest;
  float* scores = thread_floats(a.queries_per_kv * (longest / kPage + 1) * kPage);
  const int64_t num_heads = a.num_tokens * a.kv_heads, fair = (num_heads + member.size() - 1) / member.size();
  const int64_t chunk = fair < 1 ? 1 : (fair < a.kv_heads ? fair : a.kv_heads);  // a page's groups lie side by side
  member.own(num_heads, [&](int64_t i) { prepare<C>(a, i / a.kv_heads, i % a.kv_heads); });
  member.wait();
  member.tasks((num_heads + chunk - 1) / chunk, [&](int64_t task, int64_t) {
    const int64_t end = (task + 1) * chunk < num_heads ? (task + 1) * chunk : num_heads;
    for (int64_t i = task * chunk; i < end; ++i) attend<C>(a, i / a.kv_heads, i % a.kv_heads, scores);
  });
}

}  // namespace

void attention_tasks(Member& member, const DecodeAttention& a) {
  if (a.cache_is_bf16) {
    run<uint16_t>(member, a);
  } else {
    run<float>(member, a);
  }
}

void decode_attention(const DecodeAttention& a) {
  run_team(a.num_threads, [&](Member& member) { attention_tasks(member, a); });
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
