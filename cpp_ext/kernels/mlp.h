// The parts of expert MLPs that are no matrix products, and the optimizer's update. Shapes: n rows of one expert, F its
// width, H hidden size; "up" is F, or 2 F with a gate (SwiGLU), whose columns come first.
#pragma once

#include <cstdint>

namespace samoe {

enum class DType;

namespace cpu {

// a = gelu(h + b) in its tanh form, or silu(gate) * up of the halves of h + b.
struct Activate {
  DType h_dtype, a_dtype;
  const void* h_nU;
  const float* bias_U;  // may be null
  int64_t num_rows, width;
  bool gated;
  uint16_t* rounded_nU;  // where not null, h is fp32, is rounded to bf16 into here, and the rounded value is used
  void* a_nF;
};

// The gradient of h from that of a, and a again, which so need not be kept.
struct ActivateBackward {
  DType h_dtype, d_dtype;  // of h; of da, dh and a
  const void* h_nU;
  const float* bias_U;  // may be null
  const void* da_nF;
  int64_t num_rows, width;
  bool gated;
  void* a_nF;
  void* dh_nU;  // may be da_nF where there is no gate
};

// out[c] += sum over rows of x[r, c].
struct ColumnSums {
  DType dtype;
  const void* x;
  int64_t num_rows, num_columns, row_stride;
  float* out;
};

// y = x, or y += x, over num elements, from one type into another.
struct Convert {
  DType from_dtype, to_dtype;
  const void* from;
  void* to;
  int64_t num;
  bool accumulate;
};

// y[r] = round(x[r] + bias) for rows of fp32; y may be x where it is fp32.
struct AddBias {
  DType y_dtype;
  const float* x;
  const float* bias;  // may be null
  int64_t num_rows, num_columns;
  void* y;
};

// C = A B of bf16 matrices, summed in fp32: rounded into `out`, with a bias of n values or none; or added to `sum` where
// that is not null. A is [m, k], or its transpose [k, m] is given; B is [k, n], or its transpose [n, k].
struct Bf16Product {
  const uint16_t* a;
  int64_t a_stride;  // of rows, as of all strides here
  bool a_transposed;
  const uint16_t* b;
  int64_t b_stride;
  bool b_transposed;
  int64_t m, n, k;
  const float* bias;
  uint16_t* out;
  float* sum;
  int64_t out_stride;
};

// A slice that one AdamW step updates.
struct AdamWRun {
  float* master;
  uint16_t* weight;  // the bf16 weight that follows the master, or null where the master is the weight
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t num;
};

// One AdamW step (Loshchilov and Hutter, arXiv:1711.05101) over all runs, as torch.optim.AdamW makes it.
struct AdamW {
  const AdamWRun* runs;
  int64_t num_runs;
  float decay;               // 1 - lr * weight_decay
  float beta1, beta2, eps;
  float rest1, rest2;        // 1 - beta1, 1 - beta2
  float step_size;           // lr / (1 - beta1^step)
  float inverse_root;        // 1 / sqrt(1 - beta2^step)
  float grad_scale;
  int num_threads;
};

}  // namespace cpu
}  // namespace samoe
