// CPU implementation of inference: checks, scratch, launch. The blocks run several kernels in one call, because a call
// from Python costs as much as a small kernel.
#include <torch/library.h>

#include "decode_arguments.h"

namespace {

using namespace samoe::decode;
using samoe::cpu::kernels;

void decode_linear(const Tensor& x, const Tensor& w, const MaybeTensor& scale, const MaybeTensor& bias,
                   const Tensor& out, bool accumulate) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  TORCH_CHECK_VALUE(out.size(0) == x.size(0), "out has ", out.size(0), " rows, x ", x.size(0));
  kernels().decode_linear(linear_of(x.const_data_ptr<float>(), x.size(0), x.size(1), w, scale, bias, out.size(1),
                                    out.mutable_data_ptr<float>(), accumulate, "w"));
}

void decode_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double epsilon, bool rms,
                 const Tensor& out) {
  samoe::check_contiguous(x, "x", 2, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), "out is ", out.sizes(), ", x ", x.sizes());
  kernels().decode_norm(norm_of(x.const_data_ptr<float>(), x.size(0), x.size(1), weight, bias, epsilon, rms,
                                out.mutable_data_ptr<float>()));
}

// Attention of tokens at their places.
void attend(samoe::cpu::DecodeAttention a, const float* qkv, int64_t num_tokens, const Places& places, const Tensor& keys,
            const MaybeTensor& cos, float* scratch, float* out) {
  check_places(places, num_tokens, keys.size(0), cos.has_value() ? std::optional(cos->size(0)) : std::nullopt);
  a.qkv = qkv;
  a.positions_T = places.positions.const_data_ptr<int32_t>();
  a.slots_T = places.slots.const_data_ptr<int32_t>();
  a.pages = places.pages.const_data_ptr<int32_t>();
  a.pages_per_slot = places.pages.size(1);
  a.num_tokens = num_tokens;
  a.qkv_scratch = scratch;
  a.out = out;
  a.num_threads = threads_for(num_tokens * a.kv_heads * a.queries_per_kv * a.head_dim * 256);
  kernels().decode_attention(a);
}

void decode_attention(const Tensor& qkv, at::TensorList head_norms, double epsilon, bool rms, const MaybeTensor& cos,
                      const MaybeTensor& sin, const Tensor& positions, const Tensor& slots, const Tensor& pages,
                      const Tensor& keys, const Tensor& values, const Tensor& out, const Tensor& scratch) {
  samoe::check_contiguous(qkv, "qkv", 4, at::kFloat);
  samoe::check_contiguous(out, "out", 2, at::kFloat);
  const int64_t T = qkv.size(0), G = qkv.size(1), Q = qkv.size(2) - 2, D = qkv.size(3);
  TORCH_CHECK_VALUE(Q >= 1 && out.size(0) == T && out.size(1) == G * Q * D, "out is ", out.sizes());
  attend(attention_of(G, Q, D, head_norms, epsilon, rms, cos, sin, keys, values), qkv.const_data_ptr<float>(), T,
         {positions, slots, pages}, keys, cos, Scratch(scratch).floats(qkv.numel()), out.mutable_data_ptr<float>());
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
  kernels().decode_norm(norm_of(residual, T, H, norm_weight, norm_bias, epsilon, rms, normed));
  kernels().decode_linear(linear_of(normed, T, H, qkv_w, qkv_scale, qkv_bias, width, qkv, false, "qkv"));
  attend(attention_of(G, Q, D, head_norms, epsilon, rms, cos, sin, keys, values), qkv, T, {positions, slots, pages}, keys,
         cos, prepared, attended);
  kernels().decode_linear(linear_of(attended, T, G * Q * D, out_w, out_scale, out_bias, H, residual, true, "output"));
}

// The chosen experts' results in y, and added to out where it is there.
void run_experts(samoe::cpu::DecodeExperts e, const float* x, int64_t num_tokens, const int64_t* ids, const float* probs,
                 int64_t topk, float* h, float* y, bool combine, float* out) {
  for (int64_t i = 0; i < num_tokens * topk; ++i)
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < e.num_experts, "expert ", ids[i], " of ", e.num_experts);
  e.x_TH = x;
  e.ids_TK = ids;
  e.probs_TK = probs;
  e.num_tokens = num_tokens;
  e.topk = topk;
  e.h_NF = h;
  e.y_NH = y;
  e.combine = combine;
  e.out_TH = out;
  kernels().decode_experts(e);
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
  run_experts(experts_of(H, {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}),
              x.const_data_ptr<float>(), T, ids.const_data_ptr<int64_t>(), probs.const_data_ptr<float>(), K,
              pieces.floats(T * K * w2.size(-1)), y.mutable_data_ptr<float>(), combine, out.mutable_data_ptr<float>());
}

void route(const float* x, int64_t num_tokens, int64_t hidden, const Tensor& router, int64_t topk, bool sigmoid,
           bool pre_softmax, Scratch& pieces, int64_t* ids, float* probs) {
  const int64_t E = router.size(0);
  TORCH_CHECK_VALUE(router.dim() == 2 && topk >= 1 && topk <= E, "router is ", router.sizes(), ", topk ", topk);
  float* logits = pieces.floats(num_tokens * E);
  kernels().decode_linear(linear_of(x, num_tokens, hidden, router, {}, {}, E, logits, false, "router"));
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
  kernels().decode_norm(norm_of(x.const_data_ptr<float>(), x.size(0), x.size(1), norm_weight, norm_bias, epsilon, rms,
                                normed.mutable_data_ptr<float>()));
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
  kernels().decode_norm(norm_of(residual, T, H, norm_weight, norm_bias, epsilon, rms, normed));
  if (router.has_value()) {
    route(normed, T, H, *router, topk, sigmoid, pre_softmax, pieces, ids, probs);
  } else {  // a dense MLP is a single expert
    for (int64_t t = 0; t < T; ++t) ids[t] = 0, probs[t] = 1.0f;
  }
  float* h = pieces.floats(T * topk * w2.size(-1));
  float* y = pieces.floats(T * topk * H);
  run_experts(experts_of(H, {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}), normed, T, ids,
              probs, topk, h, y, true, residual);
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
