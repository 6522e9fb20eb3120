// Inference: the MLPs of chosen experts. Every expert that some token chose is read once, for all of its tokens.
#include "../../kernels.h"
#include "decode_team.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int64_t kPieceOuts = 128;
static_assert(kTileRows * kPieceOuts <= kRowBlock * kTaskOuts);  // both fit into a thread's memory

// Slots (t, k) sorted by expert: those of hit expert u are slots[starts[u]] .. slots[starts[u + 1] - 1].
struct Hits {
  explicit Hits(const DecodeExperts& a) {
    const int64_t num_slots = a.num_tokens * a.topk;
    static thread_local ThreadMemory memory;
    const int64_t count = 3 * a.num_experts + 1 + num_slots;
    counts = static_cast<int64_t*>(memory.bytes(count * static_cast<int64_t>(sizeof(int64_t))));
    experts = counts + a.num_experts;
    starts = experts + a.num_experts;
    slots = starts + a.num_experts + 1;
    memset(counts, 0, static_cast<size_t>(a.num_experts) * sizeof(int64_t));
    for (int64_t s = 0; s < num_slots; ++s)
      if (is_here(a, s)) ++counts[a.ids_TK[s]];
    int64_t start = 0;
    for (int64_t e = 0; e < a.num_experts; ++e) {
      if (counts[e] == 0) continue;
      experts[num] = e;
      starts[num++] = start;
      start += counts[e];
      counts[e] = start - counts[e];  // from here on: where the expert's next slot goes
    }
    starts[num] = start;
    for (int64_t s = 0; s < num_slots; ++s)
      if (is_here(a, s)) slots[counts[a.ids_TK[s]]++] = s;
  }
  static bool is_here(const DecodeExperts& a, int64_t slot) {
    return a.ids_TK[slot] >= 0 && a.index1_E[a.ids_TK[slot]] >= 0;
  }
  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t u = 0; u < num; ++u) {
      const int64_t rows = starts[u + 1] - starts[u];
      most = rows > most ? rows : most;
    }
    return most;
  }
  int64_t num = 0;
  int64_t *counts, *experts, *starts, *slots;
};

SAMOE_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }
// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
SAMOE_INLINE vf gelu(vf x) { return x / (1.0f + exp(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

void activate(float* h, const float* up, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t n = size - i;
    const vf x = load_part(h + i, n);
    store_part(h + i, up == nullptr ? gelu(x) : silu(x) * load_part(up + i, n), n);
  }
}

// Rows of w that a task takes, a multiple of kTaskOuts. Memory gives long pieces sooner (a gated expert's lie in two places), by 4 to
// 10 % on a Zen 5; there are still eight tasks a member. Experts of many tokens wait for their products, not for memory.
int64_t piece_outs(const Hits& hits, bool is_few, int64_t outputs, int num_members) {
  const int64_t fair = hits.num * outputs / (8 * num_members) / kTaskOuts * kTaskOuts;
  return !is_few || fair < kTaskOuts ? kTaskOuts : (fair < kPieceOuts ? fair : kPieceOuts);
}

// The experts' two products as one order of tasks: first every hit expert's columns of h, then those of y.
struct Work {
  Work(const DecodeExperts& a, const Hits& hits, int num_members)
      : a(a), hits(hits), is_few(hits.most_rows() <= kTileRows), outs1(piece_outs(hits, is_few, a.ffn, num_members)),
        outs2(piece_outs(hits, is_few, a.hidden, num_members)), tasks1((a.ffn + outs1 - 1) / outs1),
        tasks2((a.hidden + outs2 - 1) / outs2), num1(hits.num * tasks1), num(num1 + hits.num * tasks2),
        width(a.gated ? 2 * a.ffn : a.ffn) {}

  // The first weights that a task reads.
  Following start(int64_t task) const {
    if (task < num1)
      return start_of(a.w1, a.index1_E[hits.experts[task / tasks1]] * width + task % tasks1 * outs1, a.hidden);
    task -= num1;
    if (task >= num - num1) return {};
    return start_of(a.w2, a.index2_E[hits.experts[task / tasks2]] * a.hidden + task % tasks2 * outs2, a.ffn);
  }

  void first_product(int64_t task, const PackedRows& tokens, const PackedRows& packed, Following following, float* up) const {
    const int64_t u = task / tasks1, expert = hits.experts[u], row = a.index1_E[expert] * width;
    const int64_t first = task % tasks1 * outs1, last = first + outs1 < a.ffn ? first + outs1 : a.ffn;
    const float factor = a.factor1_E == nullptr ? 1.0f : a.factor1_E[expert];
    const float* bias = a.b1 == nullptr ? nullptr : a.b1 + row;
    const char* x[kRowBlock];
    float* h[kRowBlock];
    float* ups[kRowBlock];
    for (int64_t begin = hits.starts[u]; begin < hits.starts[u + 1]; begin += kRowBlock) {
      const int64_t left = hits.starts[u + 1] - begin, rows = left < kRowBlock ? left : kRowBlock;
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t slot = hits.slots[begin + m];
        x[m] = tokens.row(slot / a.topk);
        h[m] = a.h_NF + slot * a.ffn;
        ups[m] = up + m * outs1;
      }
      const Following ups_start = a.gated ? start_of(a.w1, row + a.ffn + first, a.hidden) : following;
      multiply(x, rows, a.w1, row, a.hidden, first, last, {h, 0, nullptr, bias, false, factor}, ups_start);
      if (a.gated) {
        const float* up_bias = bias == nullptr ? nullptr : bias + a.ffn;
        multiply(x, rows, a.w1, row + a.ffn, a.hidden, first, last, {ups, first, nullptr, up_bias, false, factor},
                 following);
      }
      for (int64_t m = 0; m < rows; ++m) {
        activate(h[m] + first, a.gated ? ups[m] : nullptr, last - first);
        if (packed.takes_parts(kTaskOuts)) packed.pack_part(hits.slots[begin + m], first, last - first);
      }
    }
  }

  void second_product(int64_t task, const PackedRows& slots, Following following) const {
    const int64_t u = (task - num1) / tasks2, expert = hits.experts[u], row = a.index2_E[expert] * a.hidden;
    const int64_t first = (task - num1) % tasks2 * outs2, last = first + outs2 < a.hidden ? first + outs2 : a.hidden;
    const float factor = a.factor2_E == nullptr ? 1.0f : a.factor2_E[expert];
    const float* bias = a.b2 == nullptr ? nullptr : a.b2 + row;
    const char* h[kRowBlock];
    float* y[kRowBlock];
    for (int64_t begin = hits.starts[u]; begin < hits.starts[u + 1]; begin += kRowBlock) {
      const int64_t left = hits.starts[u + 1] - begin, rows = left < kRowBlock ? left : kRowBlock;
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t slot = hits.slots[begin + m];
        h[m] = slots.row(slot);
        y[m] = a.y_NH + slot * a.hidden;
      }
      multiply(h, rows, a.w2, row, a.ffn, first, last, {y, 0, nullptr, bias, false, factor}, following);
    }
  }

  const DecodeExperts& a;
  const Hits& hits;
  const bool is_few;  // tokens of each expert
  const int64_t outs1, outs2, tasks1, tasks2, num1, num, width;
};

void combine_token(const DecodeExperts& a, int64_t t) {
  float* out = a.out_TH + t * a.hidden;
  for (int64_t k = 0; k < a.topk; ++k) {
    if (a.ids_TK[t * a.topk + k] < 0) continue;
    const float* y = a.y_NH + (t * a.topk + k) * a.hidden;
    const float prob = a.probs_TK[t * a.topk + k];
    for (int64_t i = 0; i < a.hidden; ++i) out[i] += prob * y[i];
  }
}

}  // namespace

int64_t expert_memory_bytes(const DecodeExperts& a) {
  return a.num_tokens * a.topk * packed_bytes(a.w2.type, a.ffn);
}

void experts_tasks(Member& member, const DecodeExperts& a, const PackedRows& tokens, void* memory) {
  const Hits hits(a);
  const Work work(a, hits, member.size());
  const PackedRows slots(a.h_NF, a.ffn, a.w2.type, memory);
  float* up = thread_floats(kRowBlock * kTaskOuts);
  const auto first = [&](int64_t task, int64_t after) { work.first_product(task, tokens, slots, work.start(after), up); };
  member.tasks(work.num1, first, work.num - work.num1);
  member.wait();
  if (slots.packed != nullptr && !slots.takes_parts(kTaskOuts)) {
    member.own(hits.starts[hits.num], [&](int64_t i) { slots.pack(hits.slots[i]); });
    member.wait();
  }
  const auto second = [&](int64_t task, int64_t after) {
    work.second_product(work.num1 + task, slots, work.start(work.num1 + after));
  };
  member.tasks(work.num - work.num1, second);
}

void combine_own(const Member& member, const DecodeExperts& a) {
  member.own(a.num_tokens, [&](int64_t t) { combine_token(a, t); });
}

void decode_experts(const DecodeExperts& a) {
  static thread_local ThreadMemory token_memory, slot_memory;
  const PackedRows tokens(a.x_TH, a.hidden, a.w1.type, token_memory.bytes(a.num_tokens * packed_bytes(a.w1.type, a.hidden)));
  void* const memory = slot_memory.bytes(expert_memory_bytes(a));
  run_team(a.num_threads, [&](Member& member) {
    pack_own(member, tokens, a.num_tokens);
    member.wait();
    experts_tasks(member, a, tokens, memory);
    if (!a.combine) return;
    member.wait();
    combine_own(member, a);
  });
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
