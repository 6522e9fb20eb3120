// Launchers of inference on the CPU: few tokens against many weights, each weight read once. Included by kernels.h.
//
// Activations are fp32. Every element of a result is one sum in an order of its own, so it has the same bits whatever
// other tokens are computed with it and whatever num_threads is.
#pragma once

#include <cstdint>

namespace samoe {

enum class WeightType { f32, bf16, i8 };

namespace cpu {

// How rows of weights are read: four at a time; or as a stream, asked for ahead into the first or the second cache, or into the
// first one from several pages in turn.
enum class Reading { tiles, first_cache, second_cache, pages_in_turn };

// What this processor has to read weights through.
struct Caches {
  int64_t first_bytes;  // of data, of one core
  // By which a stream comes fastest. On a Zen 4, whose first cache waits for fewer lines at a time than a Zen 5's, it comes up to
  // twice as fast into the second. An Intel core foresees a page at a time: asked for eight at once, an Ice Lake gives a fifth more.
  Reading of_streams;
};
const Caches& caches();

// Positions of one page of the key-value cache. Keys of a page are [D][kPage], values [kPage][D].
constexpr int64_t kPage = 16;

// A stack of matrices [.., rows, cols], rows contiguous. i8: weight = data * scale[row].
struct Matrix {
  WeightType type;
  const void* data;
  const float* scale;  // null unless i8
};

// out = x w^T + bias, or out += it.
struct DecodeLinear {
  const float* x_TK;
  Matrix w_NK;
  const float* bias_N;  // may be null
  int64_t num_tokens, inputs, outputs;
  bool accumulate;
  float* out_TN;
  int num_threads;
};

// out = x normalised, times weight, plus bias. rms: no mean is taken out.
struct DecodeNorm {
  const float* x_TH;
  const float* weight_H;
  const float* bias_H;  // may be null
  float epsilon;
  bool rms;
  int64_t num_tokens, hidden;
  float* out_TH;
  int num_threads;
};

// Normalises and rotates queries and keys, stores keys and values, and attends over each token's sequence up to itself.
struct DecodeAttention {
  const float* qkv;  // [T, G, Q + 2, D]: Q queries, a key, a value for each of G key-value heads
  const float* q_norm_D;  // null: no norm of queries and keys
  const float* q_norm_bias_D;
  const float* k_norm_D;
  const float* k_norm_bias_D;
  float epsilon;
  bool rms;
  const float* cos_PR;  // null: no rotation. First half of R channels pairs with the second
  const float* sin_PR;
  int64_t rotated;
  const int32_t* positions_T;
  const int32_t* slots_T;
  const int32_t* pages;  // [slots, pages_per_slot]
  int64_t pages_per_slot;
  bool cache_is_bf16;
  void* keys;    // [pages, G, D, kPage]
  void* values;  // [pages, G, kPage, D]
  int64_t num_tokens, kv_heads, queries_per_kv, head_dim;
  float* qkv_scratch;  // like qkv
  float* out;          // [T, G, Q, D]
  int num_threads;
};

// A router's choice of experts by its logits; meanings as in ops/topk_gate.py.
struct DecodeChoice {
  float* logits_TE;  // norm_scale: brought to that length in place
  int64_t num_tokens, num_experts, topk;
  bool sigmoid, pre_softmax;
  float* probs_TK;
  int64_t* ids_TK;  // -1: no expert, with a weight of 0
  const float* norm_scale = nullptr;  // of norm scores, else null
  const float* bias_E = nullptr;      // of scores where experts are chosen; may be null
  const float* candidates_E = nullptr;  // factors on scores, 0 for experts that are not chosen; may be null
  int64_t num_groups = 0, group_topk = 0;  // 0: a token may use all experts
  float factor = 1.0f;                     // on the weights
  const float* mixing_T2 = nullptr;  // logits of routed experts against the MLP beside them; null: both count whole
  float* shared_T = nullptr;         // weight of that MLP
  int num_threads = 1;
};

// MLPs of the chosen experts: rows [slot t, k] of y are expert ids[t, k]'s result for token t; ids below 0 are no
// expert's. combine: and then out[t] += sum over k of probs[t, k] * y[t, k].
struct DecodeExperts {
  const float* x_TH;
  const int64_t* ids_TK;
  const float* probs_TK;
  int64_t num_tokens, topk, num_experts;
  const int64_t* index1_E;  // matrix of each expert in w1 (and b1); below 0: it is left out
  const int64_t* index2_E;
  Matrix w1;        // [.., F, H], or [.., 2, F, H] gated
  Matrix w2;        // [.., H, F]
  const float* b1;  // [.., F] or [.., 2, F]; may be null
  const float* b2;  // [.., H]; may be null
  const float* factor1_E;  // multiplies the first product, bias included, of each expert; null: all ones
  const float* factor2_E;  // the same of the second
  int64_t hidden, ffn;
  bool gated;  // silu(gate) * up; else gelu in its tanh form
  float* h_NF;
  float* y_NH;
  bool combine;
  float* out_TH;
  int num_threads;
};

// Rows of sum over banks (of one type) of coefficient * bank, stored as out's type; i8 makes its scales from each row's peak.
struct CombineRows {
  const Matrix* banks_P;
  const float* coefficients_P;
  int64_t num_banks, num_rows, num_cols;
  WeightType out_type;
  void* out;
  float* out_scale;  // null unless i8
  int num_threads;
};

// One layer of a step. Numbers of tokens and their places are the step's.
struct DecodeLayer {
  DecodeNorm attention_norm;
  DecodeLinear qkv;
  DecodeAttention attention;
  DecodeLinear output;  // adds to the residual stream
  DecodeNorm mlp_norm;
  DecodeLinear router;  // no outputs: a dense MLP, whose ids and probs stand in `experts`
  DecodeLinear mixing;  // no outputs: routed experts and the MLP beside them count whole
  DecodeChoice choice;
  DecodeExperts experts;  // add to the residual stream
  DecodeExperts shared;   // num_experts 0: none. Of the same tokens, with ids and probs that stand there
};

// A step of a whole model, from tokens to the logits after some of them, in one parallel region.
struct DecodeStep {
  const int64_t* tokens_T;
  const int32_t* positions_T;
  const int32_t* slots_T;
  const int32_t* pages;
  int64_t pages_per_slot;
  int64_t num_tokens, hidden;
  Matrix words_VH;
  const float* positions_PH;  // may be null
  float* x_TH;                // the residual stream
  const DecodeLayer* layers;
  int64_t num_layers;
  const int64_t* rows_N;  // the tokens after which logits are wanted
  int64_t num_rows;
  float* last_NH;         // room for their rows
  DecodeNorm final_norm;  // of last_NH
  DecodeLinear head;
  int num_threads;
};

}  // namespace cpu
}  // namespace samoe
