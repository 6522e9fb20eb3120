// Launchers of the CPU kernels on raw pointers. No torch header below this line.
//
// Shapes are named as in the Python package: T tokens, K top-k, E experts, N rows, H hidden, G groups, L layers, P
// banks. bf16 is passed as raw 16-bit words. Every kernel gives the same bits whatever num_threads is.
#pragma once

#include <cstdint>

#include "decode.h"
#include "mlp.h"

namespace samoe {

enum class DType { f32, bf16 };

namespace cpu {

struct GateForward {
  const float* logits_TE;
  int64_t num_tokens, num_experts, topk, num_groups;
  bool sigmoid, pre_softmax;
  float* probs_TK;
  int64_t* ids_TK;
  int64_t* counts_GE;
  float* score_sum_GE;
  float* z_sum;
  float* logsumexp_T;
  int num_threads;
  const float* key_TE = nullptr;  // what experts are chosen by, if not by the logits
};

struct GateBackward {
  const float* logits_TE;
  const float* logsumexp_T;
  const float* probs_TK;
  const int64_t* ids_TK;
  const float* dprobs_TK;      // may be null: no gradient arrives
  const float* dscore_sum_GE;  // may be null
  const float* dz;             // one value; may be null
  int64_t num_tokens, num_experts, topk, num_groups;
  bool sigmoid, pre_softmax;
  float* dlogits_TE;
  int num_threads;
};

// Row r of out is row index[r] / divisor of x.
struct GatherRows {
  const char* x;
  const int64_t* index_N;
  int64_t num_rows, divisor, row_bytes;
  char* out;
  int num_threads;
};

struct Unpermute {
  DType dtype;
  const void* rows_NH;
  const float* probs_TK;  // null: all ones
  const int64_t* row_of_slot_TK;
  int64_t num_tokens, topk, hidden;
  void* y_TH;
  int num_threads;
};

struct UnpermuteBackward {
  DType dtype;
  const void* dy_TH;
  const void* rows_NH;
  const float* probs_TK;
  const int64_t* slot_of_row_N;   // read on a device alone, where rows of dropped slots may stand last
  const int64_t* row_of_slot_TK;
  int64_t num_tokens, topk, hidden;
  void* drows_NH;
  float* dprobs_TK;
  int num_threads;
};

// A [L or P, G, N] tensor whose last dim is contiguous.
template <typename T>
struct Strided3 {
  T* data;
  int64_t stride0, stride1;  // in elements
  T* at(int64_t i, int64_t j) const { return data + i * stride0 + j * stride1; }
};

struct Combine {
  const float* coefficients_LGP;
  Strided3<const float> banks_PGN;
  DType out_dtype;
  Strided3<char> out_LGN;  // strides in bytes
  int64_t num_layers, num_groups, num_banks, num_elements;
  int num_threads;
};

struct CombineBackward {
  const float* coefficients_LGP;
  Strided3<const float> banks_PGN, dweights_LGN;
  Strided3<float> dbanks_PGN;
  float* dcoefficients_LGP;
  int64_t num_layers, num_groups, num_banks, num_elements;
  int num_threads;
};

// Over columns first_id .. first_id + width - 1 of the vocabulary: the largest logit, the sum of exp(logit - peak), and
// the label's logit, or 0 where the label is another part's.
struct CrossEntropyForward {
  DType dtype;
  const void* logits_TV;
  const int64_t* labels_T;
  int64_t num_tokens, width, first_id;
  float* peak_T;
  float* sum_T;
  float* target_T;
  int num_threads;
};

// dlogits = (exp(logit - logsumexp) - [is the label]) * dloss.
struct CrossEntropyBackward {
  DType dtype;
  const void* logits_TV;
  const int64_t* labels_T;
  const float* logsumexp_T;
  const float* dloss_T;
  int64_t num_tokens, width, first_id;
  void* dlogits_TV;
  int num_threads;
};

// out = factor * the polynomials a x + b x^3 + c x^5 of each matrix x [rows, columns] over its Frobenius norm, num_steps times.
struct NewtonSchulz {
  const float* x;
  int64_t num, rows, columns;
  int num_steps, steps_at_once;
  float a, b, c, epsilon, factor;
  float* out;
  int num_threads;
};

// The kernels, each compiled once for every instruction set: X(result, name, arguments). copy_streamed writes past the
// cache. has_bf16_product: whether this CPU runs it, which none but AVX-512's set may; bf16_product_workspace_bytes: of
// bf16_product's work.
#define SAMOE_KERNELS(X) \
  X(void, gate_forward, (const GateForward&))                             \
  X(void, gate_backward, (const GateBackward&))                           \
  X(void, gather_rows, (const GatherRows&))                               \
  X(void, unpermute, (const Unpermute&))                                  \
  X(void, unpermute_backward, (const UnpermuteBackward&))                 \
  X(void, copy_streamed, (const char* from, char* to, int64_t num_bytes)) \
  X(void, combine, (const Combine&))                                      \
  X(void, combine_backward, (const CombineBackward&))                     \
  X(void, cross_entropy_forward, (const CrossEntropyForward&))            \
  X(void, cross_entropy_backward, (const CrossEntropyBackward&))          \
  X(void, activate, (const Activate&))                                    \
  X(void, activate_backward, (const ActivateBackward&))                   \
  X(void, column_sums, (const ColumnSums&))                               \
  X(void, convert, (const Convert&))                                      \
  X(void, add_bias, (const AddBias&))                                     \
  X(bool, has_bf16_product, ())                                           \
  X(int64_t, bf16_product_workspace_bytes, (const Bf16Product&))          \
  X(void, bf16_product, (const Bf16Product&, void* work))                 \
  X(void, adamw, (const AdamW&))                                          \
  X(void, newton_schulz, (const NewtonSchulz&))                           \
  X(void, decode_linear, (const DecodeLinear&))                           \
  X(void, decode_choose, (const DecodeChoice&))                           \
  X(void, decode_norm, (const DecodeNorm&))                               \
  X(void, decode_attention, (const DecodeAttention&))                     \
  X(void, decode_experts, (const DecodeExperts&))                         \
  X(void, combine_rows, (const CombineRows&))                             \
  X(void, decode_step, (const DecodeStep&))

struct Kernels {
  const char* instruction_set;
#define SAMOE_POINTER(result, name, arguments) result(*name) arguments;
  SAMOE_KERNELS(SAMOE_POINTER)
#undef SAMOE_POINTER
};

// The best set for this CPU, chosen once. MEGATRON_SAMOE_ISA=portable|avx2|avx512 asks for a lesser one.
const Kernels& kernels();

// Counting sort of num_slots expert ids, in two steps because the caller allocates what the first one counts.
// count_slots fills counts_E and cursor (num_chunks x E, where each chunk of slots starts writing in each expert) and
// returns the number of kept slots, or -1 with *bad_id set where an id lies outside -1..E-1.
int64_t num_slot_chunks(int64_t num_slots, int64_t num_experts, int num_threads);
int64_t count_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t num_chunks, int64_t* counts_E,
                    int64_t* cursor, int64_t* bad_id, int num_threads);
void place_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t num_chunks, int64_t* cursor,
                 int64_t* slot_of_row_N, int64_t* row_of_slot_S, int num_threads);

}  // namespace cpu
}  // namespace samoe
