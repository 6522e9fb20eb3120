// CPU implementation of inference: checks, scratch, launch. The blocks run several kernels in one call, because a call
// from Python costs as much as a small kernel.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "../common/check.h"
#include "../kernels/kernels.h"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using samoe::cpu::kernels;
using samoe::cpu::kPage;
using samoe::cpu::Matrix;

int threads_for(int64_t bytes) {
  const int64_t useful = bytes / (32 << 10), allowed = at::get_num_threads();
  return static_cast<int>(useful < 1 ? 1 : (useful < allowed ? useful : allowed));
}

const float* floats_or_null(const MaybeTensor& tensor, const char* name, int64_t numel) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, name, " is ", tensor->scalar_type(), ", not Float");
  TORCH_CHECK(tensor->device().is_cpu() && tensor->is_contiguous(), name, " is not a contiguous CPU tensor");
  TORCH_CHECK_VALUE(tensor->numel() == numel, name, " has ", tensor->numel(), " elements, not ", numel);
  return tensor->const_data_ptr<float>();
}

// A stack of [outputs, inputs] matrices; scales are one per row.
Matrix matrix_of(const Tensor& w, const MaybeTensor& scale, const char* name) {
  TORCH_CHECK(w.device().is_cpu() && w.is_contiguous() && w.dim() >= 2, name, " is not a contiguous CPU matrix");
  const auto type = w.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kChar, name, " is ", type,
                   ", not Float, BFloat16 or Char");
  TORCH_CHECK_VALUE(scale.has_value() == (type == at::kChar), name, ": int8 weights, and they alone, have scales");
  const float* scales = floats_or_null(scale, name, w.size(-1) == 0 ? 0 : w.numel() / w.size(-1));
  const auto kind = type == at::kFloat      ? samoe::WeightType::f32
                    : type == at::kBFloat16 ? samoe::WeightType::bf16
                                            : samoe::WeightType::i8;
  return {kind, w.const_data_ptr(), scales};
}

int64_t bytes_of(const Tensor& w) { return static_cast<int64_t>(w.nbytes()); }

// Hands out pieces of a buffer that the caller keeps from step to step.
class Scratch {
 public:
  explicit Scratch(const Tensor& buffer) : left_(buffer.numel()) {
    samoe::check_contiguous(buffer, "scratch", 1, at::kFloat);
    next_ = buffer.mutable_data_ptr<float>();
  }
  float* floats(int64_t count) {
    count = (count + 15) / 16 * 16;
    TORCH_CHECK_VALUE(count <= left_, "scratch is too small by ", count - left_, " floats");
    float* piece = next_;
    next_ += count;
    left_ -= count;
    return piece;
  }
  int64_t* integers(int64_t count) { return reinterpret_cast<int64_t*>(floats(2 * count)); }

 private:
  float* next_;
  int64_t left_;
};

void linear_into(const float* x, int64_t num_tokens, int64_t inputs, const Tensor& w, const MaybeTensor& scale,
                 const MaybeTensor& bias, int64_t outputs, float* out, bool accumulate, const char* name) {
  TORCH_CHECK_VALUE(w.size(-1) == inputs && w.numel() == inputs * outputs, name, " is ", w.sizes(), ", not ", outputs,
                    " x ", inputs);
  kernels().decode_linear({x, matrix_of(w, scale, name), floats_or_null(bias, name, outputs), num_tokens, inputs,
                           outputs, accumulate, out, threads_for(bytes_of(w))});
}

void decode_linear(const Tensor& x, const Tensor& w, const MaybeTensor& scale, const MaybeTensor& bias,
                   const Tensor& out, bool accumulate) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  TORCH_CHECK_VALUE(out.size(0) == x.size(0), "out has ", out.size(0), " rows, x ", x.size(0));
  linear_into(x.const_data_ptr<float>(), x.size(0), x.size(1), w, scale, bias, out.size(1),
              out.mutable_data_ptr<float>(), accumulate, "w");
}

void norm_into(const float* x, int64_t num_tokens, int64_t hidden, const Tensor& weight, const MaybeTensor& bias,
               double epsilon, bool rms, float* out) {
  kernels().decode_norm({x, floats_or_null(weight, "norm weight", hidden), floats_or_null(bias, "norm bias", hidden),
                         static_cast<float>(epsilon), rms, num_tokens, hidden, out,
                         threads_for(num_tokens * hidden)});
}

void decode_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double epsilon, bool rms,
                 const Tensor& out) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), "out is ", out.sizes(), ", x ", x.sizes());
  norm_into(x.const_data_ptr<float>(), x.size(0), x.size(1), weight, bias, epsilon, rms, out.mutable_data_ptr<float>());
}

// Where the step's tokens stand, and the layer's cache.
struct CacheArguments {
  const Tensor &positions, &slots, &pages, &keys, &values;
};

void check_cache(const CacheArguments& c, int64_t num_tokens, int64_t kv_heads, int64_t head_dim) {
  samoe::check_contiguous(c.positions, "positions", 1, at::kInt);
  samoe::check_contiguous(c.slots, "slots", 1, at::kInt);
  samoe::check_contiguous(c.pages, "pages", 2, at::kInt);
  TORCH_CHECK_VALUE(c.positions.size(0) == num_tokens && c.slots.size(0) == num_tokens,
                    "positions and slots are not those of ", num_tokens, " tokens");
  const auto type = c.keys.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, "keys are ", type, ", not Float or BFloat16");
  samoe::check_contiguous(c.keys, "keys", 4, type);
  samoe::check_contiguous(c.values, "values", 4, type);
  const int64_t num_pages = c.keys.size(0);
  TORCH_CHECK_VALUE(c.keys.sizes() == at::IntArrayRef({num_pages, kv_heads, head_dim, kPage}), "keys are ",
                    c.keys.sizes());
  TORCH_CHECK_VALUE(c.values.sizes() == at::IntArrayRef({num_pages, kv_heads, kPage, head_dim}), "values are ",
                    c.values.sizes());
  const int32_t *positions = c.positions.const_data_ptr<int32_t>(), *slots = c.slots.const_data_ptr<int32_t>();
  const int32_t* pages = c.pages.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    TORCH_CHECK_INDEX(slots[t] >= 0 && slots[t] < c.pages.size(0), "slot ", slots[t], " of ", c.pages.size(0));
    TORCH_CHECK_INDEX(positions[t] >= 0 && positions[t] < c.pages.size(1) * kPage, "position ", positions[t], " of ",
                      c.pages.size(1) * kPage);
  }
  for (int64_t i = 0; i < c.pages.numel(); ++i)
    TORCH_CHECK_INDEX(pages[i] >= 0 && pages[i] < num_pages, "page ", pages[i], " of ", num_pages);
}

// Norms of queries and keys: none, or weights of both, or weights and biases of both.
struct HeadNorms {
  const float *q = nullptr, *q_bias = nullptr, *k = nullptr, *k_bias = nullptr;
};

HeadNorms head_norms_of(at::TensorList norms, int64_t head_dim) {
  TORCH_CHECK_VALUE(norms.size() == 0 || norms.size() == 2 || norms.size() == 4, "head_norms are ", norms.size());
  std::vector<const float*> data;
  for (const Tensor& norm : norms) data.push_back(floats_or_null(norm, "head norm", head_dim));
  if (data.empty()) return {};
  return data.size() == 2 ? HeadNorms{data[0], nullptr, data[1], nullptr} : HeadNorms{data[0], data[2], data[1], data[3]};
}

void attention_into(const float* qkv, int64_t num_tokens, int64_t kv_heads, int64_t queries, int64_t head_dim,
                    at::TensorList head_norms, double epsilon, bool rms, const MaybeTensor& cos, const MaybeTensor& sin,
                    const CacheArguments& cache, float* scratch, float* out) {
  check_cache(cache, num_tokens, kv_heads, head_dim);
  const HeadNorms norms = head_norms_of(head_norms, head_dim);
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin come together");
  int64_t rotated = 0;
  if (cos.has_value()) {
    TORCH_CHECK_VALUE(cos->dim() == 2 && cos->sizes() == sin->sizes(), "cos and sin are not two equal tables");
    rotated = cos->size(1);
    TORCH_CHECK_VALUE(rotated <= head_dim && rotated % 2 == 0, "a head of ", head_dim, " with ", rotated, " rotated");
    const int32_t* positions = cache.positions.const_data_ptr<int32_t>();
    for (int64_t t = 0; t < num_tokens; ++t)
      TORCH_CHECK_INDEX(positions[t] < cos->size(0), "position ", positions[t], " has no angle");
  }
  const int64_t bytes = num_tokens * kv_heads * queries * head_dim * 256;
  kernels().decode_attention({qkv, norms.q, norms.q_bias, norms.k, norms.k_bias, static_cast<float>(epsilon), rms,
                              cos.has_value() ? floats_or_null(cos, "cos", cos->numel()) : nullptr,
                              sin.has_value() ? floats_or_null(sin, "sin", sin->numel()) : nullptr, rotated,
                              cache.positions.const_data_ptr<int32_t>(), cache.slots.const_data_ptr<int32_t>(),
                              cache.pages.const_data_ptr<int32_t>(), cache.pages.size(1),
                              cache.keys.scalar_type() == at::kBFloat16, cache.keys.mutable_data_ptr(),
                              cache.values.mutable_data_ptr(), num_tokens, kv_heads, queries, head_dim, scratch, out,
                              threads_for(bytes)});
}

void decode_attention(const Tensor& qkv, at::TensorList head_norms, double epsilon, bool rms, const MaybeTensor& cos,
                      const MaybeTensor& sin, const Tensor& positions, const Tensor& slots, const Tensor& pages,
                      const Tensor& keys, const Tensor& values, const Tensor& out, const Tensor& scratch) {
  samoe::check_contiguous(qkv, "qkv", 4, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  const int64_t T = qkv.size(0), G = qkv.size(1), Q = qkv.size(2) - 2, D = qkv.size(3);
  TORCH_CHECK_VALUE(Q >= 1 && out.size(0) == T && out.size(1) == G * Q * D, "out is ", out.sizes());
  attention_into(qkv.const_data_ptr<float>(), T, G, Q, D, head_norms, epsilon, rms, cos, sin,
                 {positions, slots, pages, keys, values}, Scratch(scratch).floats(qkv.numel()),
                 out.mutable_data_ptr<float>());
}

void decode_attention_block(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon,
                            bool rms, const Tensor& qkv_w, const MaybeTensor& qkv_scale, const MaybeTensor& qkv_bias,
                            at::TensorList head_norms, const MaybeTensor& cos, const MaybeTensor& sin,
                            const Tensor& positions, const Tensor& slots, const Tensor& pages, const Tensor& keys,
                            const Tensor& values, const Tensor& out_w, const MaybeTensor& out_scale,
                            const MaybeTensor& out_bias, const Tensor& scratch) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  TORCH_CHECK_VALUE(qkv_w.dim() == 4 && qkv_w.size(1) > 2, "qkv is ", qkv_w.sizes(), ", not [G, Q + 2, D, H]");
  const int64_t T = x.size(0), H = x.size(1), G = qkv_w.size(0), Q = qkv_w.size(1) - 2, D = qkv_w.size(2);
  const int64_t width = G * (Q + 2) * D;
  Scratch pieces(scratch);
  float* residual = x.mutable_data_ptr<float>();
  float* normed = pieces.floats(T * H);
  float* qkv = pieces.floats(T * width);
  float* prepared = pieces.floats(T * width);
  float* attended = pieces.floats(T * G * Q * D);
  norm_into(residual, T, H, norm_weight, norm_bias, epsilon, rms, normed);
  linear_into(normed, T, H, qkv_w, qkv_scale, qkv_bias, width, qkv, false, "qkv");
  attention_into(qkv, T, G, Q, D, head_norms, epsilon, rms, cos, sin, {positions, slots, pages, keys, values}, prepared,
                 attended);
  linear_into(attended, T, G * Q * D, out_w, out_scale, out_bias, H, residual, true, "output");
}

// The experts' weights: stacks of matrices, and which of them each expert uses.
struct ExpertArguments {
  const Tensor &index1, &index2, &w1;
  const MaybeTensor &scale1, &b1;
  const Tensor& w2;
  const MaybeTensor &scale2, &b2, &factor1, &factor2;
  bool gated;
};

void check_index(const Tensor& index, const char* name, int64_t num_experts, int64_t num_matrices) {
  samoe::check_contiguous(index, name, 1, at::kLong);
  TORCH_CHECK_VALUE(index.size(0) == num_experts, name, " has ", index.size(0), " entries for ", num_experts, " experts");
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e)
    TORCH_CHECK_INDEX(values[e] >= -1 && values[e] < num_matrices, name, "[", e, "] = ", values[e], " of ",
                      num_matrices);
}

void experts_into(const float* x, int64_t num_tokens, int64_t hidden, const int64_t* ids, const float* probs,
                  int64_t topk, const ExpertArguments& a, float* h, float* y, bool combine, float* out) {
  TORCH_CHECK_VALUE(a.w2.dim() == 3 && a.w2.size(1) == hidden, "w2 is ", a.w2.sizes(), ", not [.., ", hidden, ", F]");
  const int64_t ffn = a.w2.size(2), width = a.gated ? 2 * ffn : ffn, num_experts = a.index1.size(0);
  TORCH_CHECK_VALUE(a.w1.dim() == (a.gated ? 4 : 3) && a.w1.size(-1) == hidden &&
                        a.w1.numel() == a.w1.size(0) * width * hidden,
                    "w1 is ", a.w1.sizes(), " beside w2 ", a.w2.sizes());
  check_index(a.index1, "index1", num_experts, a.w1.size(0));
  check_index(a.index2, "index2", num_experts, a.w2.size(0));
  for (int64_t i = 0; i < num_tokens * topk; ++i)
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < num_experts, "expert ", ids[i], " of ", num_experts);
  kernels().decode_experts({x, ids, probs, num_tokens, topk, num_experts, a.index1.const_data_ptr<int64_t>(),
                            a.index2.const_data_ptr<int64_t>(), matrix_of(a.w1, a.scale1, "w1"),
                            matrix_of(a.w2, a.scale2, "w2"), floats_or_null(a.b1, "b1", a.w1.size(0) * width),
                            floats_or_null(a.b2, "b2", a.w2.size(0) * hidden),
                            floats_or_null(a.factor1, "factor1", num_experts),
                            floats_or_null(a.factor2, "factor2", num_experts), hidden, ffn, a.gated, h, y, combine, out,
                            threads_for(hidden * ffn * static_cast<int64_t>(a.w2.element_size()) * 3)});
}

void decode_experts(const Tensor& x, const Tensor& ids, const Tensor& probs, const Tensor& index1, const Tensor& index2,
                    const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1, const Tensor& w2,
                    const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                    const MaybeTensor& factor2, bool gated, const Tensor& y, bool combine, const Tensor& out,
                    const Tensor& scratch) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  samoe::check_contiguous(ids, "ids", 2, at::kLong);
  samoe::check_contiguous(probs, "probs", 2, at::kFloat);
  samoe::check_contiguous(y, "y", 3, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  const int64_t T = x.size(0), H = x.size(1), K = ids.size(1);
  TORCH_CHECK_VALUE(ids.size(0) == T && probs.sizes() == ids.sizes() && out.sizes() == x.sizes(),
                    "ids, probs or out do not belong to x");
  TORCH_CHECK_VALUE(y.sizes() == at::IntArrayRef({T, K, H}), "y is ", y.sizes());
  Scratch pieces(scratch);
  experts_into(x.const_data_ptr<float>(), T, H, ids.const_data_ptr<int64_t>(), probs.const_data_ptr<float>(), K,
               {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, pieces.floats(T * K * w2.size(-1)),
               y.mutable_data_ptr<float>(), combine, out.mutable_data_ptr<float>());
}

void route(const float* x, int64_t num_tokens, int64_t hidden, const Tensor& router, int64_t topk, bool sigmoid,
           bool pre_softmax, Scratch& pieces, int64_t* ids, float* probs) {
  const int64_t E = router.size(0);
  TORCH_CHECK_VALUE(router.dim() == 2 && topk >= 1 && topk <= E, "router is ", router.sizes(), ", topk ", topk);
  float* logits = pieces.floats(num_tokens * E);
  linear_into(x, num_tokens, hidden, router, std::nullopt, std::nullopt, E, logits, false, "router");
  int64_t* counts = pieces.integers(E);
  float* sums = pieces.floats(E);
  float* logsumexp = pieces.floats(num_tokens);
  float z_sum;
  kernels().gate_forward({logits, num_tokens, E, topk, 1, sigmoid, pre_softmax, probs, ids, counts, sums, &z_sum,
                          logsumexp, threads_for(num_tokens * E * 8)});
}

void decode_route(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                  const Tensor& router, bool sigmoid, bool pre_softmax, const Tensor& normed, const Tensor& ids,
                  const Tensor& probs, const Tensor& scratch) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  samoe::check_contiguous(normed, "normed", 2, at::kFloat);
  samoe::check_contiguous(ids, "ids", 2, at::kLong);
  samoe::check_contiguous(probs, "probs", 2, at::kFloat);
  TORCH_CHECK_VALUE(normed.sizes() == x.sizes() && ids.size(0) == x.size(0) && probs.sizes() == ids.sizes(),
                    "normed, ids or probs do not belong to x");
  Scratch pieces(scratch);
  norm_into(x.const_data_ptr<float>(), x.size(0), x.size(1), norm_weight, norm_bias, epsilon, rms,
            normed.mutable_data_ptr<float>());
  route(normed.const_data_ptr<float>(), x.size(0), x.size(1), router, ids.size(1), sigmoid, pre_softmax, pieces,
        ids.mutable_data_ptr<int64_t>(), probs.mutable_data_ptr<float>());
}

void decode_moe_block(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                      const MaybeTensor& router, int64_t topk, bool sigmoid, bool pre_softmax, const Tensor& index1,
                      const Tensor& index2, const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1,
                      const Tensor& w2, const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                      const MaybeTensor& factor2, bool gated, const Tensor& scratch) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  const int64_t T = x.size(0), H = x.size(1);
  TORCH_CHECK_VALUE(topk >= 1 && (router.has_value() || topk == 1), "topk = ", topk);
  Scratch pieces(scratch);
  float* residual = x.mutable_data_ptr<float>();
  float* normed = pieces.floats(T * H);
  int64_t* ids = pieces.integers(T * topk);
  float* probs = pieces.floats(T * topk);
  norm_into(residual, T, H, norm_weight, norm_bias, epsilon, rms, normed);
  if (router.has_value()) {
    route(normed, T, H, *router, topk, sigmoid, pre_softmax, pieces, ids, probs);
  } else {  // a dense MLP is a single expert
    for (int64_t t = 0; t < T; ++t) ids[t] = 0, probs[t] = 1.0f;
  }
  float* h = pieces.floats(T * topk * w2.size(-1));
  float* y = pieces.floats(T * topk * H);
  experts_into(normed, T, H, ids, probs, topk, {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, h, y, true,
               residual);
}

std::vector<MaybeTensor> optional_list(const c10::List<MaybeTensor>& list) {
  std::vector<MaybeTensor> found;
  for (size_t i = 0; i < list.size(); ++i) found.push_back(list.get(i));
  return found;
}

void combine_rows(at::TensorList banks, const c10::List<MaybeTensor>& scales, const Tensor& coefficients,
                  const Tensor& out, const MaybeTensor& out_scale) {
  samoe::check_contiguous(coefficients, "coefficients", 1, at::kFloat);
  TORCH_CHECK_VALUE(!banks.empty() && static_cast<int64_t>(banks.size()) == coefficients.size(0) &&
                        banks.size() == scales.size(),
                    banks.size(), " banks, ", scales.size(), " scales, ", coefficients.size(0), " coefficients");
  const Matrix target = matrix_of(out, out_scale, "out");
  std::vector<Matrix> sources;
  const auto bank_scales = optional_list(scales);
  for (size_t p = 0; p < banks.size(); ++p) {
    TORCH_CHECK_VALUE(banks[p].sizes() == out.sizes(), "a bank is ", banks[p].sizes(), ", out ", out.sizes());
    sources.push_back(matrix_of(banks[p], bank_scales[p], "bank"));
  }
  const int64_t cols = out.size(-1), rows = cols == 0 ? 0 : out.numel() / cols;
  kernels().combine_rows({sources.data(), coefficients.const_data_ptr<float>(), coefficients.size(0), rows, cols,
                          target.type, out.mutable_data_ptr(),
                          out_scale.has_value() ? out_scale->mutable_data_ptr<float>() : nullptr,
                          threads_for(bytes_of(out) * (coefficients.size(0) + 1))});
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  m.impl("decode_linear", decode_linear);
  m.impl("decode_norm", decode_norm);
  m.impl("decode_attention", decode_attention);
  m.impl("decode_attention_block", decode_attention_block);
  m.impl("decode_experts", decode_experts);
  m.impl("decode_route", decode_route);
  m.impl("decode_moe_block", decode_moe_block);
  m.impl("combine_rows", combine_rows);
}
