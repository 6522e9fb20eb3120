// CUDA implementation of inference: checks, scratch, launch. Nothing is allocated and nothing waits for the device, so a
// step can be captured in a CUDA graph. Values on the device (expert ids and indices, positions, slots, pages) are looked
// at by the kernels, which stop by an assertion.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "cuda_backend.h"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using samoe::CudaBackend;
using samoe::cpu::kPage;
using samoe::cpu::Matrix;
namespace cuda = samoe::cuda;

const float* floats_or_null(const CudaBackend& backend, const MaybeTensor& tensor, const char* name, int64_t numel) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, name, " is ", tensor->scalar_type(), ", not Float");
  backend.check_device(*tensor, name);
  TORCH_CHECK(tensor->is_contiguous(), name, " is not contiguous");
  TORCH_CHECK_VALUE(tensor->numel() == numel, name, " has ", tensor->numel(), " elements, not ", numel);
  return tensor->const_data_ptr<float>();
}

// A stack of [outputs, inputs] matrices; scales are one per row.
Matrix matrix_of(const CudaBackend& backend, const Tensor& w, const MaybeTensor& scale, const char* name) {
  backend.check_device(w, name);
  TORCH_CHECK(w.is_contiguous() && w.dim() >= 2, name, " is not a contiguous matrix");
  const auto type = w.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kChar, name, " is ", type,
                   ", not Float, BFloat16 or Char");
  TORCH_CHECK_VALUE(scale.has_value() == (type == at::kChar), name, ": int8 weights, and they alone, have scales");
  const float* scales = floats_or_null(backend, scale, name, w.size(-1) == 0 ? 0 : w.numel() / w.size(-1));
  const auto kind = type == at::kFloat      ? samoe::WeightType::f32
                    : type == at::kBFloat16 ? samoe::WeightType::bf16
                                            : samoe::WeightType::i8;
  return {kind, w.const_data_ptr(), scales};
}

// Hands out pieces of a buffer that the caller keeps from step to step.
class Scratch {
 public:
  Scratch(const CudaBackend& backend, const Tensor& buffer) : left_(buffer.numel()) {
    backend.check_contiguous(buffer, "scratch", 1, at::kFloat);
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
  void* bytes(int64_t count) { return floats((count + 3) / 4); }
  float* rest() const { return next_; }
  int64_t left() const { return left_; }

 private:
  float* next_;
  int64_t left_;
};

void linear_into(const CudaBackend& backend, const float* x, int64_t num_tokens, int64_t inputs, const Tensor& w,
                 const MaybeTensor& scale, const MaybeTensor& bias, int64_t outputs, float* out, bool accumulate,
                 const char* name) {
  TORCH_CHECK_VALUE(w.size(-1) == inputs && w.numel() == inputs * outputs, name, " is ", w.sizes(), ", not ", outputs,
                    " x ", inputs);
  cuda::decode_linear({x, matrix_of(backend, w, scale, name), floats_or_null(backend, bias, name, outputs), num_tokens,
                       inputs, outputs, accumulate, out, 0},
                      backend.stream());
}

void decode_linear(const Tensor& x, const Tensor& w, const MaybeTensor& scale, const MaybeTensor& bias,
                   const Tensor& out, bool accumulate) {
  const CudaBackend backend(x, "x");
  backend.check_contiguous(x, "x", 2, at::kFloat);
  backend.check_contiguous(out, "out", 2, at::kFloat);
  TORCH_CHECK_VALUE(out.size(0) == x.size(0), "out has ", out.size(0), " rows, x ", x.size(0));
  linear_into(backend, x.const_data_ptr<float>(), x.size(0), x.size(1), w, scale, bias, out.size(1),
              out.mutable_data_ptr<float>(), accumulate, "w");
  backend.check_launches();
}

// A norm's parameters as the ops take them.
struct NormArguments {
  const Tensor& weight;
  const MaybeTensor& bias;
  double epsilon;
  bool rms;
};

void norm_into(const CudaBackend& backend, const float* x, int64_t num_tokens, int64_t hidden, const NormArguments& a,
               float* out) {
  cuda::decode_norm({x, floats_or_null(backend, a.weight, "norm weight", hidden),
                     floats_or_null(backend, a.bias, "norm bias", hidden), static_cast<float>(a.epsilon), a.rms,
                     num_tokens, hidden, out, 0},
                    backend.stream());
}

void decode_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double epsilon, bool rms,
                 const Tensor& out) {
  const CudaBackend backend(x, "x");
  backend.check_contiguous(x, "x", 2, at::kFloat);
  backend.check_contiguous(out, "out", 2, at::kFloat);
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), "out is ", out.sizes(), ", x ", x.sizes());
  norm_into(backend, x.const_data_ptr<float>(), x.size(0), x.size(1), {weight, bias, epsilon, rms},
            out.mutable_data_ptr<float>());
  backend.check_launches();
}

// Where the step's tokens stand, and the layer's cache.
struct CacheArguments {
  const Tensor &positions, &slots, &pages, &keys, &values;
};

void check_cache(const CudaBackend& backend, const CacheArguments& c, int64_t num_tokens, int64_t kv_heads,
                 int64_t head_dim) {
  backend.check_contiguous(c.positions, "positions", 1, at::kInt);
  backend.check_contiguous(c.slots, "slots", 1, at::kInt);
  backend.check_contiguous(c.pages, "pages", 2, at::kInt);
  TORCH_CHECK_VALUE(c.positions.size(0) == num_tokens && c.slots.size(0) == num_tokens,
                    "positions and slots are not those of ", num_tokens, " tokens");
  const auto type = c.keys.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, "keys are ", type, ", not Float or BFloat16");
  backend.check_contiguous(c.keys, "keys", 4, type);
  backend.check_contiguous(c.values, "values", 4, type);
  const int64_t num_pages = c.keys.size(0);
  TORCH_CHECK_VALUE(c.keys.sizes() == at::IntArrayRef({num_pages, kv_heads, head_dim, kPage}), "keys are ",
                    c.keys.sizes());
  TORCH_CHECK_VALUE(c.values.sizes() == at::IntArrayRef({num_pages, kv_heads, kPage, head_dim}), "values are ",
                    c.values.sizes());
  TORCH_CHECK_VALUE(head_dim >= 1 && head_dim <= cuda::kMaxHeadDim, "a head of ", head_dim, ", of at most ",
                    cuda::kMaxHeadDim, " on a GPU");
}

// Adds nothing to the stream's work but attention: qkv is [T, G, Q + 2, D], Q in `queries`.
void attention_into(const CudaBackend& backend, const float* qkv, int64_t num_tokens, int64_t kv_heads, int64_t queries,
                    int64_t head_dim, at::TensorList norms, const NormArguments& norm, const MaybeTensor& cos,
                    const MaybeTensor& sin, const CacheArguments& cache, Scratch& pieces, float* out) {
  check_cache(backend, cache, num_tokens, kv_heads, head_dim);
  TORCH_CHECK_VALUE(norms.size() == 0 || norms.size() == 2 || norms.size() == 4, "head_norms are ", norms.size());
  // Of queries and keys: none, weights of both, or weights and then biases of both.
  const float* of_heads[4] = {};
  for (size_t i = 0; i < norms.size(); ++i) of_heads[i] = floats_or_null(backend, norms[i], "head norm", head_dim);
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin come together");
  int64_t rotated = 0;
  if (cos.has_value()) {
    TORCH_CHECK_VALUE(cos->dim() == 2 && cos->sizes() == sin->sizes(), "cos and sin are not two equal tables");
    rotated = cos->size(1);
    TORCH_CHECK_VALUE(rotated <= head_dim && rotated % 2 == 0, "a head of ", head_dim, " with ", rotated, " rotated");
  }
  float* prepared = pieces.floats(num_tokens * kv_heads * (queries + 2) * head_dim);
  cuda::decode_attention(
      {qkv, of_heads[0], of_heads[2], of_heads[1], of_heads[3], static_cast<float>(norm.epsilon), norm.rms,
       cos.has_value() ? floats_or_null(backend, cos, "cos", cos->numel()) : nullptr,
       sin.has_value() ? floats_or_null(backend, sin, "sin", sin->numel()) : nullptr, rotated,
       cache.positions.const_data_ptr<int32_t>(), cache.slots.const_data_ptr<int32_t>(),
       cache.pages.const_data_ptr<int32_t>(), cache.pages.size(1), cache.keys.scalar_type() == at::kBFloat16,
       cache.keys.mutable_data_ptr(), cache.values.mutable_data_ptr(), num_tokens, kv_heads, queries, head_dim, prepared,
       out, 0},
      {cache.pages.size(0), cache.keys.size(0), cos.has_value() ? cos->size(0) : 0}, pieces.rest(), pieces.left(),
      backend.stream());
}

void decode_attention_block(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon,
                            bool rms, const Tensor& qkv_w, const MaybeTensor& qkv_scale, const MaybeTensor& qkv_bias,
                            at::TensorList head_norms, const MaybeTensor& cos, const MaybeTensor& sin,
                            const Tensor& positions, const Tensor& slots, const Tensor& pages, const Tensor& keys,
                            const Tensor& values, const Tensor& out_w, const MaybeTensor& out_scale,
                            const MaybeTensor& out_bias, const Tensor& scratch) {
  const CudaBackend backend(x, "x");
  backend.check_contiguous(x, "x", 2, at::kFloat);
  TORCH_CHECK_VALUE(qkv_w.dim() == 4 && qkv_w.size(1) > 2, "qkv is ", qkv_w.sizes(), ", not [G, Q + 2, D, H]");
  const int64_t T = x.size(0), H = x.size(1), G = qkv_w.size(0), Q = qkv_w.size(1) - 2, D = qkv_w.size(2);
  const int64_t width = G * (Q + 2) * D;
  const NormArguments norm = {norm_weight, norm_bias, epsilon, rms};
  Scratch pieces(backend, scratch);
  float* residual = x.mutable_data_ptr<float>();
  float* normed = pieces.floats(T * H);
  float* qkv = pieces.floats(T * width);
  float* attended = pieces.floats(T * G * Q * D);
  norm_into(backend, residual, T, H, norm, normed);
  linear_into(backend, normed, T, H, qkv_w, qkv_scale, qkv_bias, width, qkv, false, "qkv");
  attention_into(backend, qkv, T, G, Q, D, head_norms, norm, cos, sin, {positions, slots, pages, keys, values}, pieces,
                 attended);
  linear_into(backend, attended, T, G * Q * D, out_w, out_scale, out_bias, H, residual, true, "output");
  backend.check_launches();
}

// The experts' weights: stacks of matrices, and which of them each expert uses.
struct ExpertArguments {
  const Tensor &index1, &index2, &w1;
  const MaybeTensor &scale1, &b1;
  const Tensor& w2;
  const MaybeTensor &scale2, &b2, &factor1, &factor2;
  bool gated;
};

void check_index(const CudaBackend& backend, const Tensor& index, const char* name, int64_t num_experts) {
  backend.check_contiguous(index, name, 1, at::kLong);
  TORCH_CHECK_VALUE(index.size(0) == num_experts, name, " has ", index.size(0), " entries for ", num_experts, " experts");
}

void experts_into(const CudaBackend& backend, const float* x, int64_t num_tokens, int64_t hidden, const int64_t* ids,
                  const float* probs, int64_t topk, const ExpertArguments& a, Scratch& pieces, float* y, bool combine,
                  float* out) {
  TORCH_CHECK_VALUE(a.w2.dim() == 3 && a.w2.size(1) == hidden, "w2 is ", a.w2.sizes(), ", not [.., ", hidden, ", F]");
  const int64_t ffn = a.w2.size(2), width = a.gated ? 2 * ffn : ffn, num_experts = a.index1.size(0);
  TORCH_CHECK_VALUE(a.w1.dim() == (a.gated ? 4 : 3) && a.w1.size(-1) == hidden &&
                        a.w1.numel() == a.w1.size(0) * width * hidden,
                    "w1 is ", a.w1.sizes(), " beside w2 ", a.w2.sizes());
  check_index(backend, a.index1, "index1", num_experts);
  check_index(backend, a.index2, "index2", num_experts);
  const samoe::cpu::DecodeExperts arguments = {
      x, ids, probs, num_tokens, topk, num_experts, a.index1.const_data_ptr<int64_t>(),
      a.index2.const_data_ptr<int64_t>(), matrix_of(backend, a.w1, a.scale1, "w1"),
      matrix_of(backend, a.w2, a.scale2, "w2"), floats_or_null(backend, a.b1, "b1", a.w1.size(0) * width),
      floats_or_null(backend, a.b2, "b2", a.w2.size(0) * hidden),
      floats_or_null(backend, a.factor1, "factor1", num_experts),
      floats_or_null(backend, a.factor2, "factor2", num_experts), hidden, ffn, a.gated,
      pieces.floats(num_tokens * topk * ffn), y, combine, out, 0};
  void* workspace = pieces.bytes(cuda::decode_experts_workspace_bytes(arguments));
  cuda::decode_experts(arguments, a.w1.size(0), a.w2.size(0), workspace, backend.stream());
}

void decode_experts(const Tensor& x, const Tensor& ids, const Tensor& probs, const Tensor& index1, const Tensor& index2,
                    const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1, const Tensor& w2,
                    const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                    const MaybeTensor& factor2, bool gated, const Tensor& y, bool combine, const Tensor& out,
                    const Tensor& scratch) {
  const CudaBackend backend(x, "x");
  backend.check_contiguous(x, "x", 2, at::kFloat);
  backend.check_contiguous(ids, "ids", 2, at::kLong);
  backend.check_contiguous(probs, "probs", 2, at::kFloat);
  backend.check_contiguous(y, "y", 3, at::kFloat);
  backend.check_contiguous(out, "out", 2, at::kFloat);
  const int64_t T = x.size(0), H = x.size(1), K = ids.size(1);
  TORCH_CHECK_VALUE(ids.size(0) == T && probs.sizes() == ids.sizes() && out.sizes() == x.sizes(),
                    "ids, probs or out do not belong to x");
  TORCH_CHECK_VALUE(y.sizes() == at::IntArrayRef({T, K, H}), "y is ", y.sizes());
  Scratch pieces(backend, scratch);
  experts_into(backend, x.const_data_ptr<float>(), T, H, ids.const_data_ptr<int64_t>(), probs.const_data_ptr<float>(), K,
               {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, pieces,
               y.mutable_data_ptr<float>(), combine, out.mutable_data_ptr<float>());
  backend.check_launches();
}

// How a router chooses.
struct RouteArguments {
  const Tensor& router;
  int64_t topk;
  bool sigmoid, pre_softmax;
};

void route(const CudaBackend& backend, const float* x, int64_t num_tokens, int64_t hidden, const RouteArguments& r,
           Scratch& pieces, int64_t* ids, float* probs) {
  const int64_t E = r.router.size(0);
  TORCH_CHECK_VALUE(r.router.dim() == 2 && r.topk >= 1 && r.topk <= E, "router is ", r.router.sizes(), ", topk ", r.topk);
  float* logits = pieces.floats(num_tokens * E);
  linear_into(backend, x, num_tokens, hidden, r.router, std::nullopt, std::nullopt, E, logits, false, "router");
  int64_t* counts = pieces.integers(E);
  float* sums = pieces.floats(E);
  float* z_sum = pieces.floats(1);
  float* logsumexp = pieces.floats(num_tokens);
  const samoe::cpu::GateForward gate = {logits, num_tokens, E,      r.topk, 1,     r.sigmoid, r.pre_softmax,
                                        probs,  ids,        counts, sums,   z_sum, logsumexp, 0};
  cuda::gate_forward(gate, pieces.bytes(cuda::gate_workspace_bytes(gate)), backend.stream());
}

void decode_route(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                  const Tensor& router, bool sigmoid, bool pre_softmax, const Tensor& normed, const Tensor& ids,
                  const Tensor& probs, const Tensor& scratch) {
  const CudaBackend backend(x, "x");
  backend.check_contiguous(x, "x", 2, at::kFloat);
  backend.check_contiguous(normed, "normed", 2, at::kFloat);
  backend.check_contiguous(ids, "ids", 2, at::kLong);
  backend.check_contiguous(probs, "probs", 2, at::kFloat);
  TORCH_CHECK_VALUE(normed.sizes() == x.sizes() && ids.size(0) == x.size(0) && probs.sizes() == ids.sizes(),
                    "normed, ids or probs do not belong to x");
  Scratch pieces(backend, scratch);
  const int64_t T = x.size(0), H = x.size(1);
  norm_into(backend, x.const_data_ptr<float>(), T, H, {norm_weight, norm_bias, epsilon, rms},
            normed.mutable_data_ptr<float>());
  route(backend, normed.const_data_ptr<float>(), T, H, {router, ids.size(1), sigmoid, pre_softmax}, pieces,
        ids.mutable_data_ptr<int64_t>(), probs.mutable_data_ptr<float>());
  backend.check_launches();
}

void decode_moe_block(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                      const MaybeTensor& router, int64_t topk, bool sigmoid, bool pre_softmax, const Tensor& index1,
                      const Tensor& index2, const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1,
                      const Tensor& w2, const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                      const MaybeTensor& factor2, bool gated, const Tensor& scratch) {
  const CudaBackend backend(x, "x");
  backend.check_contiguous(x, "x", 2, at::kFloat);
  const int64_t T = x.size(0), H = x.size(1);
  TORCH_CHECK_VALUE(topk >= 1 && (router.has_value() || topk == 1), "topk = ", topk);
  Scratch pieces(backend, scratch);
  float* residual = x.mutable_data_ptr<float>();
  float* normed = pieces.floats(T * H);
  int64_t* ids = pieces.integers(T * topk);
  float* probs = pieces.floats(T * topk);
  norm_into(backend, residual, T, H, {norm_weight, norm_bias, epsilon, rms}, normed);
  if (router.has_value()) {
    route(backend, normed, T, H, {*router, topk, sigmoid, pre_softmax}, pieces, ids, probs);
  } else {  // a dense MLP is a single expert
    cuda::choose_only_expert(T, ids, probs, backend.stream());
  }
  float* y = pieces.floats(T * topk * H);
  experts_into(backend, normed, T, H, ids, probs, topk,
               {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, pieces, y, true, residual);
  backend.check_launches();
}

void combine_rows(at::TensorList banks, const c10::List<MaybeTensor>& scales, const Tensor& coefficients,
                  const Tensor& out, const MaybeTensor& out_scale) {
  const CudaBackend backend(coefficients, "coefficients");
  backend.check_contiguous(coefficients, "coefficients", 1, at::kFloat);
  TORCH_CHECK_VALUE(!banks.empty() && static_cast<int64_t>(banks.size()) == coefficients.size(0) &&
                        banks.size() == scales.size(),
                    banks.size(), " banks, ", scales.size(), " scales, ", coefficients.size(0), " coefficients");
  TORCH_CHECK_VALUE(coefficients.size(0) <= cuda::kMaxDecodeBanks, banks.size(), " banks, of at most ",
                    cuda::kMaxDecodeBanks, " on a GPU");
  const Matrix target = matrix_of(backend, out, out_scale, "out");
  std::vector<Matrix> sources;
  for (size_t p = 0; p < banks.size(); ++p) {
    TORCH_CHECK_VALUE(banks[p].sizes() == out.sizes(), "a bank is ", banks[p].sizes(), ", out ", out.sizes());
    sources.push_back(matrix_of(backend, banks[p], scales.get(p), "bank"));
  }
  const int64_t cols = out.size(-1), rows = cols == 0 ? 0 : out.numel() / cols;
  cuda::combine_rows({sources.data(), coefficients.const_data_ptr<float>(), coefficients.size(0), rows, cols, target.type,
                      out.mutable_data_ptr(), out_scale.has_value() ? out_scale->mutable_data_ptr<float>() : nullptr, 0},
                     backend.stream());
  backend.check_launches();
}

}  // namespace

SAMOE_CUDA_LIBRARY_IMPL(m) {
  m.impl("decode_linear", decode_linear);
  m.impl("decode_norm", decode_norm);
  m.impl("decode_attention_block", decode_attention_block);
  m.impl("decode_experts", decode_experts);
  m.impl("decode_route", decode_route);
  m.impl("decode_moe_block", decode_moe_block);
  m.impl("combine_rows", combine_rows);
}
