// Arguments of the inference ops of every backend: every tensor is looked at once, here, and becomes part of a kernel's
// arguments. `checks` knows the device where they must lie. Values (places, indices of experts) can be looked at on a CPU
// alone; on CUDA the kernels do it, and stop by an assertion.
#pragma once

#include <optional>
#include <vector>

#include "../check.h"
#include "../../kernels/kernels.h"

namespace samoe {
namespace decode {

using cpu::kPage;
using cpu::Matrix;
using MaybeTensor = std::optional<Tensor>;

inline int threads_for(int64_t bytes) {
  const int64_t useful = bytes / (32 << 10), allowed = num_threads();
  return static_cast<int>(useful < 1 ? 1 : (useful < allowed ? useful : allowed));
}

inline TensorChecks on_cpu() { return TensorChecks(DeviceType::CPU); }

inline const float* floats_or_null(const MaybeTensor& tensor, const char* name, int64_t numel,
                                   const TensorChecks& checks = on_cpu()) {
  if (!tensor.has_value()) return nullptr;
  SAMOE_CHECK(tensor->scalar_type() == kFloat, name, " is ", tensor->scalar_type(), ", not Float");
  checks.check_device(*tensor, name);
  SAMOE_CHECK(tensor->is_contiguous(), name, " is not contiguous");
  SAMOE_CHECK(tensor->numel() == numel, name, " has ", tensor->numel(), " elements, not ", numel);
  return tensor->const_data_ptr<float>();
}

// How many rows the matrices of a stack have together: their elements would not say it of rows without any.
inline int64_t rows_of(const Tensor& w) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < w.dim(); ++dim) rows = product({rows, w.size(dim)});
  return rows;
}

// A stack of [outputs, inputs] matrices; scales are one per row.
inline Matrix matrix_of(const Tensor& w, const MaybeTensor& scale, const char* name,
                        const TensorChecks& checks = on_cpu()) {
  checks.check_device(w, name);
  SAMOE_CHECK(w.is_contiguous() && w.dim() >= 2, name, " is not a contiguous matrix");
  const auto type = w.scalar_type();
  SAMOE_CHECK(type == kFloat || type == kBFloat16 || type == kChar, name, " is ", type,
                   ", not Float, BFloat16 or Char");
  SAMOE_CHECK(scale.has_value() == (type == kChar), name, ": int8 weights, and they alone, have scales");
  const float* scales = floats_or_null(scale, name, rows_of(w), checks);
  const auto kind = type == kFloat      ? WeightType::f32
                    : type == kBFloat16 ? WeightType::bf16
                                            : WeightType::i8;
  return {kind, w.const_data_ptr(), scales};
}

inline int64_t bytes_of(const Tensor& w) { return nbytes(w); }

// Hands out pieces of a buffer that the caller keeps from step to step.
class Scratch {
 public:
  explicit Scratch(const Tensor& buffer, const TensorChecks& checks = on_cpu()) : left_(buffer.numel()) {
    checks.check_contiguous(buffer, "scratch", 1, kFloat);
    next_ = buffer.mutable_data_ptr<float>();
    SAMOE_CHECK(reinterpret_cast<uintptr_t>(next_) % 16 == 0, "scratch does not begin at a multiple of 16 bytes");
  }
  // As many as the sizes come to, rounded up to 16.
  float* floats(std::initializer_list<int64_t> sizes) {
    const int64_t wanted = product(sizes), left = left_ / 16 * 16;
    SAMOE_CHECK(wanted <= left, "scratch is too small: it has ", left, " floats left, not ", wanted);
    const int64_t count = (wanted + 15) / 16 * 16;
    float* piece = next_;
    next_ += count;
    left_ -= count;
    return piece;
  }
  int64_t* integers(std::initializer_list<int64_t> sizes) {
    return reinterpret_cast<int64_t*>(floats({2, product(sizes)}));
  }
  void* bytes(int64_t count) { return floats({(count + 3) / 4}); }
  // What was not handed out.
  float* rest() const { return next_; }
  int64_t num_left() const { return left_; }

 private:
  float* next_;
  int64_t left_;
};

inline cpu::DecodeNorm norm_of(const float* x, int64_t num_tokens, int64_t hidden, const Tensor& weight,
                               const MaybeTensor& bias, double epsilon, bool rms, float* out,
                               const TensorChecks& checks = on_cpu()) {
  return {x, floats_or_null(weight, "norm weight", hidden, checks), floats_or_null(bias, "norm bias", hidden, checks),
          static_cast<float>(epsilon), rms, num_tokens, hidden, out, threads_for(num_tokens * hidden)};
}

inline cpu::DecodeLinear linear_of(const float* x, int64_t num_tokens, int64_t inputs, const Tensor& w,
                                   const MaybeTensor& scale, const MaybeTensor& bias, int64_t outputs, float* out,
                                   bool accumulate, const char* name, const TensorChecks& checks = on_cpu()) {
  SAMOE_CHECK(w.size(-1) == inputs && rows_of(w) == outputs, name, " is ", w.sizes(), ", not ", outputs, " x ", inputs);
  return {x, matrix_of(w, scale, name, checks), floats_or_null(bias, name, outputs, checks), num_tokens, inputs, outputs,
          accumulate, out, threads_for(bytes_of(w))};
}

// Where a step's tokens stand.
struct Places {
  const Tensor &positions, &slots, &pages;
};

// Each place must be one of the cache's, and have angles where heads are rotated.
inline void check_places(const Places& p, int64_t num_tokens, int64_t num_pages, std::optional<int64_t> num_angles,
                         const TensorChecks& checks = on_cpu()) {
  checks.check_sizes(p.positions, "positions", {num_tokens}, kInt);
  checks.check_sizes(p.slots, "slots", {num_tokens}, kInt);
  checks.check_contiguous(p.pages, "pages", 2, kInt);
  if (!checks.device().is_cpu()) return;
  const int32_t *positions = p.positions.const_data_ptr<int32_t>(), *slots = p.slots.const_data_ptr<int32_t>();
  const int32_t* pages = p.pages.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    SAMOE_CHECK(slots[t] >= 0 && slots[t] < p.pages.size(0), "slot ", slots[t], " of ", p.pages.size(0));
    SAMOE_CHECK(positions[t] >= 0 && positions[t] < p.pages.size(1) * kPage, "position ", positions[t], " of ",
                      p.pages.size(1) * kPage);
    SAMOE_CHECK(!num_angles.has_value() || positions[t] < *num_angles, "position ", positions[t], " has no angle");
  }
  bool bad = false;
  for (int64_t i = 0; i < p.pages.numel(); ++i) bad |= pages[i] < 0 || pages[i] >= num_pages;
  SAMOE_CHECK(!bad, "pages hold a page outside 0 to ", num_pages - 1);
}

// Norms of queries and keys: none, or weights of both, or weights and biases of both.
struct HeadNorms {
  const float *q = nullptr, *q_bias = nullptr, *k = nullptr, *k_bias = nullptr;
};

inline HeadNorms head_norms_of(const Tensors& norms, int64_t head_dim, const TensorChecks& checks = on_cpu()) {
  SAMOE_CHECK(norms.size() == 0 || norms.size() == 2 || norms.size() == 4, "head_norms are ", norms.size());
  std::vector<const float*> data;
  for (const Tensor& norm : norms) data.push_back(floats_or_null(norm, "head norm", head_dim, checks));
  if (data.empty()) return {};
  return data.size() == 2 ? HeadNorms{data[0], nullptr, data[1], nullptr} : HeadNorms{data[0], data[2], data[1], data[3]};
}

// Attention but for the places of its tokens, and for qkv, its scratch and its result.
inline cpu::DecodeAttention attention_of(int64_t kv_heads, int64_t queries, int64_t head_dim, const Tensors& head_norms,
                                         double epsilon, bool rms, const MaybeTensor& cos, const MaybeTensor& sin,
                                         const Tensor& keys, const Tensor& values,
                                         const TensorChecks& checks = on_cpu()) {
  const auto type = keys.scalar_type();
  SAMOE_CHECK(type == kFloat || type == kBFloat16, "keys are ", type, ", not Float or BFloat16");
  checks.check_contiguous(keys, "keys", 4, type);
  checks.check_sizes(keys, "keys", {keys.size(0), kv_heads, head_dim, kPage}, type);
  checks.check_sizes(values, "values", {keys.size(0), kv_heads, kPage, head_dim}, type);
  SAMOE_CHECK(cos.has_value() == sin.has_value(), "cos and sin come together");
  const HeadNorms norms = head_norms_of(head_norms, head_dim, checks);
  cpu::DecodeAttention a = {};
  if (cos.has_value()) {
    SAMOE_CHECK(cos->dim() == 2 && cos->sizes().equals(sin->sizes()), "cos and sin are not two equal tables");
    a.rotated = cos->size(1);
    SAMOE_CHECK(a.rotated <= head_dim && a.rotated % 2 == 0, "a head of ", head_dim, " with ", a.rotated,
                      " rotated");
    a.cos_PR = floats_or_null(cos, "cos", cos->numel(), checks);
    a.sin_PR = floats_or_null(sin, "sin", sin->numel(), checks);
  }
  a.q_norm_D = norms.q;
  a.q_norm_bias_D = norms.q_bias;
  a.k_norm_D = norms.k;
  a.k_norm_bias_D = norms.k_bias;
  a.epsilon = static_cast<float>(epsilon);
  a.rms = rms;
  a.cache_is_bf16 = type == kBFloat16;
  a.keys = keys.mutable_data_ptr();
  a.values = values.mutable_data_ptr();
  a.kv_heads = kv_heads;
  a.queries_per_kv = queries;
  a.head_dim = head_dim;
  return a;
}

// A router and what it chooses by.
struct RouterArguments {
  const Tensor& weight;
  const MaybeTensor &norm_scale, &bias, &candidates, &mixing, &mixing_bias;
  int64_t topk;
  bool sigmoid, pre_softmax;
  int64_t num_groups, group_topk;
  double factor;
};

// A choice but for its logits and what it writes.
inline cpu::DecodeChoice choice_of(int64_t num_tokens, int64_t hidden, const RouterArguments& a,
                                   const TensorChecks& checks = on_cpu()) {
  const int64_t E = a.weight.size(0), G = a.num_groups;
  SAMOE_CHECK(a.weight.scalar_type() == kFloat, "router is ", a.weight.scalar_type(), ", not Float");
  SAMOE_CHECK(a.weight.dim() == 2 && a.topk >= 1 && a.topk <= E, "router is ", a.weight.sizes(), ", topk ", a.topk);
  SAMOE_CHECK(G == 0 || (G > 0 && E % G == 0 && a.group_topk >= 1 && a.group_topk <= G && a.topk % a.group_topk == 0 &&
                               a.topk / a.group_topk <= E / G),
                    "a token uses ", a.topk, " of ", E, " experts in ", a.group_topk, " of ", G, " groups");
  SAMOE_CHECK(a.mixing.has_value() == a.mixing_bias.has_value(), "mixing comes with its bias");
  if (a.mixing.has_value()) floats_or_null(a.mixing, "mixing", 2 * hidden, checks);
  cpu::DecodeChoice choice = {};
  choice.num_tokens = num_tokens;
  choice.num_experts = E;
  choice.topk = a.topk;
  choice.sigmoid = a.sigmoid;
  choice.pre_softmax = a.pre_softmax;
  choice.norm_scale = floats_or_null(a.norm_scale, "norm_scale", 1, checks);
  choice.bias_E = floats_or_null(a.bias, "router_bias", E, checks);
  choice.candidates_E = floats_or_null(a.candidates, "candidates", E, checks);
  choice.num_groups = G;
  choice.group_topk = a.group_topk;
  choice.factor = static_cast<float>(a.factor);
  choice.num_threads = threads_for(num_tokens * E * 8);
  return choice;
}

// The experts' weights: stacks of matrices, and which of them each expert uses.
struct ExpertArguments {
  const Tensor &index1, &index2, &w1;
  const MaybeTensor &scale1, &b1;
  const Tensor& w2;
  const MaybeTensor &scale2, &b2, &factor1, &factor2;
  bool gated;
};

inline void check_index(const Tensor& index, const char* name, int64_t num_experts, int64_t num_matrices,
                        const TensorChecks& checks) {
  checks.check_sizes(index, name, {num_experts}, kLong);
  if (!checks.device().is_cpu()) return;
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e)
    SAMOE_CHECK(values[e] >= -1 && values[e] < num_matrices, name, "[", e, "] = ", values[e], " of ",
                      num_matrices);
}

// Experts but for what they are given and what they write.
inline cpu::DecodeExperts experts_of(int64_t hidden, const ExpertArguments& a, const TensorChecks& checks = on_cpu()) {
  SAMOE_CHECK(a.w2.dim() == 3 && a.w2.size(1) == hidden, "w2 is ", a.w2.sizes(), ", not [.., ", hidden, ", F]");
  const int64_t ffn = a.w2.size(2), width = product({a.gated ? 2 : 1, ffn}), num_experts = a.index1.size(0);
  SAMOE_CHECK(a.w1.dim() == (a.gated ? 4 : 3) && a.w1.size(-1) == hidden &&
                        rows_of(a.w1) == product({a.w1.size(0), width}),
                    "w1 is ", a.w1.sizes(), " beside w2 ", a.w2.sizes());
  check_index(a.index1, "index1", num_experts, a.w1.size(0), checks);
  check_index(a.index2, "index2", num_experts, a.w2.size(0), checks);
  for (int64_t i = 0; i < (checks.device().is_cpu() ? num_experts : 0); ++i)
    SAMOE_CHECK((a.index1.const_data_ptr<int64_t>()[i] < 0) == (a.index2.const_data_ptr<int64_t>()[i] < 0), "expert ", i,
                      " is left out of one of index1 and index2");
  cpu::DecodeExperts e = {};
  e.num_experts = num_experts;
  e.index1_E = a.index1.const_data_ptr<int64_t>();
  e.index2_E = a.index2.const_data_ptr<int64_t>();
  e.w1 = matrix_of(a.w1, a.scale1, "w1", checks);
  e.w2 = matrix_of(a.w2, a.scale2, "w2", checks);
  e.b1 = floats_or_null(a.b1, "b1", product({a.w1.size(0), width}), checks);
  e.b2 = floats_or_null(a.b2, "b2", product({a.w2.size(0), hidden}), checks);
  e.factor1_E = floats_or_null(a.factor1, "factor1", num_experts, checks);
  e.factor2_E = floats_or_null(a.factor2, "factor2", num_experts, checks);
  e.hidden = hidden;
  e.ffn = ffn;
  e.gated = a.gated;
  e.num_threads = threads_for(hidden * ffn * static_cast<int64_t>(a.w2.element_size()) * 3);
  return e;
}

}  // namespace decode
}  // namespace samoe
