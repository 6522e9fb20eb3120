// The inference ops for every backend: checks, scratch, launch. The blocks run several kernels in one call, because a call
// from Python costs as much as a small kernel. Nothing is allocated, and on CUDA nothing waits for the device, so that a
// step can be captured in a graph.
//
// A backend has norm, linear, attention, choose, choose_only_expert, experts and combine_rows beside what it has for other
// ops. What it needs besides the arguments it takes from the scratch.
#pragma once

#include <vector>

#include "arguments.h"

namespace samoe {
namespace decode {

template <typename B>
void decode_linear(const Tensor& x, const Tensor& w, const MaybeTensor& scale, const MaybeTensor& bias,
                   const Tensor& out, bool accumulate) {
  const B backend(x, "x");
  backend.check_contiguous(x, "x", 2, kFloat);
  backend.check_contiguous(out, "out", 2, kFloat);
  SAMOE_CHECK(out.size(0) == x.size(0), "out has ", out.size(0), " rows, x ", x.size(0));
  backend.linear(linear_of(x.const_data_ptr<float>(), x.size(0), x.size(1), w, scale, bias, out.size(1),
                           out.mutable_data_ptr<float>(), accumulate, "w", backend));
}

template <typename B>
void decode_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, double epsilon, bool rms,
                 const Tensor& out) {
  const B backend(x, "x");
  backend.check_contiguous(x, "x", 2, kFloat);
  backend.check_sizes(out, "out", x.sizes(), kFloat);
  backend.norm(norm_of(x.const_data_ptr<float>(), x.size(0), x.size(1), weight, bias, epsilon, rms,
                       out.mutable_data_ptr<float>(), backend));
}

// Attention of tokens at their places.
template <typename B>
void attend(const B& backend, cpu::DecodeAttention a, const float* qkv, int64_t num_tokens, const Places& places,
            const Tensor& keys, const MaybeTensor& cos, Scratch& pieces, float* out) {
  const std::optional<int64_t> num_angles = cos.has_value() ? std::optional(cos->size(0)) : std::nullopt;
  check_places(places, num_tokens, keys.size(0), num_angles, backend);
  a.qkv = qkv;
  a.positions_T = places.positions.const_data_ptr<int32_t>();
  a.slots_T = places.slots.const_data_ptr<int32_t>();
  a.pages = places.pages.const_data_ptr<int32_t>();
  a.pages_per_slot = places.pages.size(1);
  a.num_tokens = num_tokens;
  a.qkv_scratch = pieces.floats({num_tokens, a.kv_heads, a.queries_per_kv + 2, a.head_dim});
  a.out = out;
  a.num_threads = threads_for(num_tokens * a.kv_heads * a.queries_per_kv * a.head_dim * 256);
  backend.attention(a, places.pages.size(0), keys.size(0), num_angles.value_or(0), pieces);
}

template <typename B>
void decode_attention_block(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon,
                            bool rms, const Tensor& qkv_w, const MaybeTensor& qkv_scale, const MaybeTensor& qkv_bias,
                            const Tensors& head_norms, const MaybeTensor& cos, const MaybeTensor& sin,
                            const Tensor& positions, const Tensor& slots, const Tensor& pages, const Tensor& keys,
                            const Tensor& values, const Tensor& out_w, const MaybeTensor& out_scale,
                            const MaybeTensor& out_bias, const Tensor& scratch) {
  const B backend(x, "x");
  backend.check_contiguous(x, "x", 2, kFloat);
  SAMOE_CHECK(qkv_w.dim() == 4 && qkv_w.size(1) > 2, "qkv is ", qkv_w.sizes(), ", not [G, Q + 2, D, H]");
  const int64_t T = x.size(0), H = x.size(1), G = qkv_w.size(0), Q = qkv_w.size(1) - 2, D = qkv_w.size(2);
  const int64_t width = product({G, Q + 2, D});
  Scratch pieces(scratch, backend);
  float* residual = x.mutable_data_ptr<float>();
  float* normed = pieces.floats({T, H});
  float* qkv = pieces.floats({T, width});
  float* attended = pieces.floats({T, G, Q, D});
  backend.norm(norm_of(residual, T, H, norm_weight, norm_bias, epsilon, rms, normed, backend));
  backend.linear(linear_of(normed, T, H, qkv_w, qkv_scale, qkv_bias, width, qkv, false, "qkv", backend));
  attend(backend, attention_of(G, Q, D, head_norms, epsilon, rms, cos, sin, keys, values, backend), qkv, T,
         {positions, slots, pages}, keys, cos, pieces, attended);
  backend.linear(linear_of(attended, T, G * Q * D, out_w, out_scale, out_bias, H, residual, true, "output", backend));
}

// On CUDA the kernels do it.
inline void check_ids(const TensorChecks& checks, const int64_t* ids, int64_t count, int64_t num_experts) {
  if (!checks.device().is_cpu()) return;
  for (int64_t i = 0; i < count; ++i)
    SAMOE_CHECK(ids[i] >= -1 && ids[i] < num_experts, "expert ", ids[i], " of ", num_experts);
}

// The chosen experts' results in y, and added to out where it is there.
template <typename B>
void run_experts(const B& backend, cpu::DecodeExperts e, const Tensor& w1, const Tensor& w2, const float* x,
                 int64_t num_tokens, const int64_t* ids, const float* probs, int64_t topk, Scratch& pieces, float* y,
                 bool combine, float* out) {
  e.x_TH = x;
  e.ids_TK = ids;
  e.probs_TK = probs;
  e.num_tokens = num_tokens;
  e.topk = topk;
  e.h_NF = pieces.floats({num_tokens, topk, e.ffn});
  e.y_NH = y;
  e.combine = combine;
  e.out_TH = out;
  check_ids(backend, ids, num_tokens * topk, e.num_experts);
  backend.experts(e, w1.size(0), w2.size(0), pieces);
}

template <typename B>
void decode_experts(const Tensor& x, const Tensor& ids, const Tensor& probs, const Tensor& index1, const Tensor& index2,
                    const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1, const Tensor& w2,
                    const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                    const MaybeTensor& factor2, bool gated, const Tensor& y, bool combine, const Tensor& out,
                    const Tensor& scratch) {
  const B backend(x, "x");
  backend.check_contiguous(x, "x", 2, kFloat);
  backend.check_contiguous(ids, "ids", 2, kLong);
  const int64_t T = x.size(0), H = x.size(1), K = ids.size(1);
  SAMOE_CHECK(ids.size(0) == T, "ids is ", ids.sizes(), ", for ", T, " tokens");
  backend.check_sizes(probs, "probs", ids.sizes(), kFloat);
  backend.check_sizes(y, "y", {T, K, H}, kFloat);
  backend.check_sizes(out, "out", x.sizes(), kFloat);
  Scratch pieces(scratch, backend);
  const auto experts =
      experts_of(H, {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, backend);
  run_experts(backend, experts, w1, w2, x.const_data_ptr<float>(), T, ids.const_data_ptr<int64_t>(),
              probs.const_data_ptr<float>(), K, pieces, y.mutable_data_ptr<float>(), combine,
              out.mutable_data_ptr<float>());
}

// Ids and probs of normalised tokens, and with mixing the weights of the MLP beside the experts.
template <typename B>
void route(const B& backend, const float* x, int64_t num_tokens, int64_t hidden, const RouterArguments& router,
           Scratch& pieces, int64_t* ids, float* probs, float* shared = nullptr) {
  auto choice = choice_of(num_tokens, hidden, router, backend);
  const int64_t E = choice.num_experts;
  choice.logits_TE = pieces.floats({num_tokens, E});
  choice.ids_TK = ids;
  choice.probs_TK = probs;
  backend.linear(linear_of(x, num_tokens, hidden, router.weight, {}, {}, E, choice.logits_TE, false, "router", backend));
  if (router.mixing.has_value()) {
    float* mixing = pieces.floats({num_tokens, 2});
    backend.linear(linear_of(x, num_tokens, hidden, *router.mixing, {}, router.mixing_bias, 2, mixing, false, "mixing", backend));
    choice.mixing_T2 = mixing;
    choice.shared_T = shared;
  }
  backend.choose(choice, pieces);
}

template <typename B>
void decode_route(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                  const Tensor& router, const MaybeTensor& norm_scale, const MaybeTensor& router_bias,
                  const MaybeTensor& candidates, const MaybeTensor& mixing, const MaybeTensor& mixing_bias, bool sigmoid, bool pre_softmax,
                  int64_t num_groups, int64_t group_topk, double factor, const Tensor& normed, const Tensor& ids,
                  const Tensor& probs, const MaybeTensor& shared, const Tensor& scratch) {
  const B backend(x, "x");
  backend.check_contiguous(x, "x", 2, kFloat);
  backend.check_contiguous(ids, "ids", 2, kLong);
  SAMOE_CHECK(ids.size(0) == x.size(0), "ids is ", ids.sizes(), ", for ", x.size(0), " tokens");
  backend.check_sizes(normed, "normed", x.sizes(), kFloat);
  backend.check_sizes(probs, "probs", ids.sizes(), kFloat);
  SAMOE_CHECK(shared.has_value() == mixing.has_value(), "mixing gives weights of the shared MLP, and it alone");
  floats_or_null(shared, "shared", x.size(0), backend);
  Scratch pieces(scratch, backend);
  float* rows = normed.mutable_data_ptr<float>();
  backend.norm(
      norm_of(x.const_data_ptr<float>(), x.size(0), x.size(1), norm_weight, norm_bias, epsilon, rms, rows, backend));
  route(backend, rows, x.size(0), x.size(1),
        {router, norm_scale, router_bias, candidates, mixing, mixing_bias, ids.size(1), sigmoid, pre_softmax, num_groups, group_topk, factor},
        pieces, ids.mutable_data_ptr<int64_t>(), probs.mutable_data_ptr<float>(),
        shared.has_value() ? shared->mutable_data_ptr<float>() : nullptr);
}

template <typename B>
void decode_moe_block(const Tensor& x, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                      const MaybeTensor& router, int64_t topk, bool sigmoid, bool pre_softmax, const Tensor& index1,
                      const Tensor& index2, const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1,
                      const Tensor& w2, const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                      const MaybeTensor& factor2, bool gated, const Tensor& scratch) {
  const B backend(x, "x");
  backend.check_contiguous(x, "x", 2, kFloat);
  const int64_t T = x.size(0), H = x.size(1);
  SAMOE_CHECK(topk >= 1 && (router.has_value() || topk == 1), "topk = ", topk);
  const auto experts =
      experts_of(H, {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, backend);
  Scratch pieces(scratch, backend);
  float* residual = x.mutable_data_ptr<float>();
  float* normed = pieces.floats({T, H});
  int64_t* ids = pieces.integers({T, topk});
  float* probs = pieces.floats({T, topk});
  backend.norm(norm_of(residual, T, H, norm_weight, norm_bias, epsilon, rms, normed, backend));
  if (router.has_value()) {
    const MaybeTensor none;
    route(backend, normed, T, H, {*router, none, none, none, none, none, topk, sigmoid, pre_softmax, 0, 0, 1.0}, pieces, ids, probs);
  } else {  // a dense MLP is a single expert
    backend.choose_only_expert(T, ids, probs);
  }
  float* y = pieces.floats({T, topk, H});
  run_experts(backend, experts, w1, w2, normed, T, ids, probs, topk, pieces, y, true, residual);
}

template <typename B>
void combine_rows(const Tensors& banks, const std::vector<MaybeTensor>& scales, const Tensor& coefficients,
                  const Tensor& out, const MaybeTensor& out_scale) {
  const B backend(coefficients, "coefficients");
  backend.check_contiguous(coefficients, "coefficients", 1, kFloat);
  SAMOE_CHECK(!banks.empty() && static_cast<int64_t>(banks.size()) == coefficients.size(0) &&
                        banks.size() == scales.size(),
                    banks.size(), " banks, ", scales.size(), " scales, ", coefficients.size(0), " coefficients");
  const Matrix target = matrix_of(out, out_scale, "out", backend);
  std::vector<Matrix> sources;
  for (size_t p = 0; p < banks.size(); ++p) {
    SAMOE_CHECK(banks[p].sizes().equals(out.sizes()), "a bank is ", banks[p].sizes(), ", out ", out.sizes());
    sources.push_back(matrix_of(banks[p], scales[p], "bank", backend));
    SAMOE_CHECK(sources[p].type == sources[0].type, "banks are of several types");
  }
  if (out.numel() == 0) return;
  const int64_t cols = out.size(-1), rows = rows_of(out);
  backend.combine_rows({sources.data(), coefficients.const_data_ptr<float>(), coefficients.size(0), rows, cols,
                        target.type, out.mutable_data_ptr(),
                        out_scale.has_value() ? out_scale->mutable_data_ptr<float>() : nullptr,
                        threads_for(bytes_of(out) * (coefficients.size(0) + 1))});
}

template <typename B>
void add_decode_ops(Library& m) {
  SAMOE_IMPL(m, "decode_linear", decode_linear<B>);
  SAMOE_IMPL(m, "decode_norm", decode_norm<B>);
  SAMOE_IMPL(m, "decode_attention_block", decode_attention_block<B>);
  SAMOE_IMPL(m, "decode_experts", decode_experts<B>);
  SAMOE_IMPL(m, "decode_route", decode_route<B>);
  SAMOE_IMPL(m, "decode_moe_block", decode_moe_block<B>);
  SAMOE_IMPL(m, "combine_rows", combine_rows<B>);
}

}  // namespace decode
}  // namespace samoe
