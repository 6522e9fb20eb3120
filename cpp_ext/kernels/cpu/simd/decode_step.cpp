// Inference: a step of a whole model, one parallel region in which its kernels follow each other.
#include "../../kernels.h"
#include "decode_team.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

void embed(const DecodeStep& a, int64_t t) {
  float* out = a.x_TH + t * a.hidden;
  add_row(a.words_VH, a.tokens_T[t], 1.0f, a.hidden, true, out);
  if (a.positions_PH == nullptr) return;
  const float* position = a.positions_PH + a.positions_T[t] * a.hidden;
  for (int64_t i = 0; i < a.hidden; ++i) out[i] += position[i];
}

// Packed rows of two products in turn: while one's are read, the next one's are made.
struct PackedMemory {
  void* rows;   // of a norm's result
  void* inner;  // of attention's result, or of the experts' hidden layers
};

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The layer's arguments with the step's tokens.
DecodeLayer with_tokens(const DecodeStep& step, const DecodeLayer& layer) {
  DecodeLayer a = layer;
  a.attention_norm.num_tokens = a.mlp_norm.num_tokens = step.num_tokens;
  a.qkv.num_tokens = a.output.num_tokens = step.num_tokens;
  a.router.num_tokens = a.mixing.num_tokens = a.choice.num_tokens = step.num_tokens;
  a.experts.num_tokens = a.shared.num_tokens = a.attention.num_tokens = step.num_tokens;
  a.attention.positions_T = step.positions_T;
  a.attention.slots_T = step.slots_T;
  a.attention.pages = step.pages;
  a.attention.pages_per_slot = step.pages_per_slot;
  return a;
}

// Everything is added to the residual stream by the members that own its tokens, so the next norm waits for nobody.
void run_layer(Member& member, const DecodeLayer& a, const PackedMemory& memory) {
  const int64_t num_tokens = a.qkv.num_tokens;
  const PackedRows normed(a.qkv.x_TK, a.qkv.inputs, a.qkv.w_NK.type, memory.rows);
  ask_for_linear(member, a.qkv);
  norm_own(member, a.attention_norm);
  pack_own(member, normed, num_tokens);
  member.wait();
  linear_tasks(member, a.qkv, normed);
  member.wait();
  const PackedRows attended(a.output.x_TK, a.output.inputs, a.output.w_NK.type, memory.inner);
  attention_tasks(member, a.attention, &attended);
  ask_for_linear(member, a.output);
  member.wait();
  if (attended.packed != nullptr && !attended.takes_parts(attention_part(a.attention))) {
    pack_own(member, attended, num_tokens);
    member.wait();
  }
  linear_tasks(member, a.output, attended);
  member.wait();

  if (a.router.outputs > 0) ask_for_linear(member, a.router);
  norm_own(member, a.mlp_norm);
  const PackedRows tokens(a.experts.x_TH, a.experts.hidden, a.experts.w1.type, memory.rows);
  pack_own(member, tokens, num_tokens);
  member.wait();
  if (a.router.outputs > 0) {
    const PackedRows rows(a.router.x_TK, a.router.inputs, a.router.w_NK.type, nullptr);
    linear_tasks(member, a.router, rows);
    if (a.mixing.outputs > 0) linear_tasks(member, a.mixing, rows);
    member.wait();
    float* work = thread_floats(choice_floats(a.choice.num_experts));
    member.own(num_tokens, [&](int64_t t) { choose_experts(a.choice, t, work); });
    member.wait();
  }
  experts_tasks(member, a.experts, tokens, memory.inner);
  member.wait();
  combine_own(member, a.experts);
  if (a.shared.num_experts == 0) return;
  member.wait();  // its hidden layer may lie where the routed experts' results do
  experts_tasks(member, a.shared, tokens, memory.inner);
  member.wait();
  combine_own(member, a.shared);
}

}  // namespace

void decode_step(const DecodeStep& a) {
  static thread_local ThreadMemory first, second;
  int64_t row_bytes = packed_bytes(a.head.w_NK.type, a.head.inputs) * a.num_rows, inner_bytes = 0;
  for (int64_t l = 0; l < a.num_layers; ++l) {
    const DecodeLayer layer = with_tokens(a, a.layers[l]);
    const int64_t token_bytes = larger(packed_bytes(layer.qkv.w_NK.type, layer.qkv.inputs),
                                       packed_bytes(layer.experts.w1.type, layer.experts.hidden));
    row_bytes = larger(row_bytes, a.num_tokens * token_bytes);
    inner_bytes = larger(inner_bytes, a.num_tokens * packed_bytes(layer.output.w_NK.type, layer.output.inputs));
    inner_bytes = larger(inner_bytes, expert_memory_bytes(layer.experts));
    if (layer.shared.num_experts > 0) inner_bytes = larger(inner_bytes, expert_memory_bytes(layer.shared));
  }
  const PackedMemory memory = {first.bytes(row_bytes), second.bytes(inner_bytes)};
  run_team(a.num_threads, [&](Member& member) {
    member.own(a.num_tokens, [&](int64_t t) { embed(a, t); });
    for (int64_t l = 0; l < a.num_layers; ++l) run_layer(member, with_tokens(a, a.layers[l]), memory);
    if (a.num_rows == 0) return;
    member.wait();
    const size_t size = static_cast<size_t>(a.hidden) * sizeof(float);
    member.own(a.num_rows, [&](int64_t i) { memcpy(a.last_NH + i * a.hidden, a.x_TH + a.rows_N[i] * a.hidden, size); });
    DecodeNorm norm = a.final_norm;
    DecodeLinear head = a.head;
    norm.num_tokens = head.num_tokens = a.num_rows;
    const PackedRows rows(head.x_TK, head.inputs, head.w_NK.type, memory.rows);
    ask_for_linear(member, head);
    norm_own(member, norm);
    pack_own(member, rows, a.num_rows);
    member.wait();
    linear_tasks(member, head, rows);
  });
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe
