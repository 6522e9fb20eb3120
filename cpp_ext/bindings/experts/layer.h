// The arguments of the grouped MLP ops, checked, for every backend.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../arguments.h"

namespace samoe {

// The weights of e experts, and how many rows each of them has.
struct ExpertLayer {
  Tensor w1, w2;
  MaybeTensor b1, b2;
  bool gated;
  std::vector<int64_t> rows;
  int64_t total, hidden, width, up;  // R, H, F, and F or 2 F
  DType dtype;                       // of all tensors but main gradients

  int64_t num_experts() const { return static_cast<int64_t>(rows.size()); }
};

inline ExpertLayer check_expert_layer(const TensorChecks& checks, const Tensor& x, Sizes rows,
                                      const Tensor& w1, const Tensor& w2, const MaybeTensor& b1,
                                      const MaybeTensor& b2, bool gated) {
  checks.check_rows(x, "x");
  const auto dtype = x.scalar_type();
  checks.check_contiguous(w1, "w1", gated ? 4 : 3, dtype);
  checks.check_contiguous(w2, "w2", 3, dtype);
  const int64_t experts = static_cast<int64_t>(rows.size()), hidden = x.size(1), width = w2.size(2);
  const int64_t up = gated ? 2 * width : width;
  SAMOE_CHECK(w1.size(0) == experts && w2.size(0) == experts, "rows has ", experts, " experts, w1 ", w1.size(0),
                    ", w2 ", w2.size(0));
  SAMOE_CHECK(!gated || w1.size(1) == 2, "w1 is ", w1.sizes(), "; with a gate it is [e, 2, F, H]");
  SAMOE_CHECK(w1.size(-2) == width && w1.size(-1) == hidden && w2.size(1) == hidden, "w1 is ", w1.sizes(),
                    " and w2 ", w2.sizes(), " for rows of ", hidden);
  SAMOE_CHECK(width > 0 && hidden > 0, "w2 is ", w2.sizes(), "; experts need a width and a hidden size");
  const auto check_bias = [&](const MaybeTensor& b, const char* name, int64_t dims, int64_t num) {
    if (!b.has_value()) return;
    checks.check_contiguous(*b, name, dims, dtype);
    SAMOE_CHECK(b->numel() == experts * num, name, " is ", b->sizes(), ", not ", num, " values an expert");
  };
  check_bias(b1, "b1", gated ? 3 : 2, up);
  check_bias(b2, "b2", 2, hidden);
  int64_t total = 0;
  for (const int64_t n : rows) {
    SAMOE_CHECK(n >= 0 && !__builtin_add_overflow(total, n, &total), "an expert has ", n, " rows");
  }
  SAMOE_CHECK(total == x.size(0), "rows sums to ", total, ", x has ", x.size(0), " rows");
  return {w1, w2, b1, b2, gated, rows.vec(), total, hidden, width, up, dtype_of(x)};
}

// Main gradients, fp32, in the shapes of the weights.
struct MainGrads {
  Tensor w1, w2;
  MaybeTensor b1, b2;
};

inline void check_backward(const TensorChecks& checks, const ExpertLayer& layer, const Tensor& dy,
                           const Tensor& x, const Tensor& hidden, const MainGrads& grads) {
  checks.check_sizes(dy, "dy", x.sizes(), x.scalar_type());
  checks.check_sizes(hidden, "hidden", {layer.total, layer.up}, x.scalar_type());
  checks.check_sizes(grads.w1, "dw1", layer.w1.sizes(), kFloat);
  checks.check_sizes(grads.w2, "dw2", layer.w2.sizes(), kFloat);
  const int64_t e = layer.num_experts();
  if (grads.b1.has_value()) {
    checks.check_contiguous(*grads.b1, "db1", grads.b1->dim(), kFloat);
    SAMOE_CHECK(grads.b1->numel() == e * layer.up, "db1 is ", grads.b1->sizes());
  }
  checks.check_sizes(grads.b2, "db2", {e, layer.hidden}, kFloat);
}

// The ops for a backend B, whose experts E(backend, layer) have forward(x, keep_hidden) and backward(dy, x, hidden, grads).
template <typename B, typename E>
std::tuple<Tensor, Tensor> grouped_mlp(const Tensor& x, Sizes rows, const Tensor& w1,
                                               const Tensor& w2, const MaybeTensor& b1,
                                               const MaybeTensor& b2, bool gated, bool keep_hidden) {
  const B backend(x, "x");
  const ExpertLayer layer = check_expert_layer(backend, x, rows, w1, w2, b1, b2, gated);
  return E(backend, layer).forward(x, keep_hidden);
}

template <typename B, typename E>
Tensor grouped_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& hidden,
                                Sizes rows, const Tensor& w1, const Tensor& w2,
                                const MaybeTensor& b1, bool gated, const Tensor& dw1,
                                const Tensor& dw2, const MaybeTensor& db1,
                                const MaybeTensor& db2) {
  const B backend(x, "x");
  const ExpertLayer layer = check_expert_layer(backend, x, rows, w1, w2, b1, std::nullopt, gated);
  const MainGrads grads{dw1, dw2, db1, db2};
  check_backward(backend, layer, dy, x, hidden, grads);
  return E(backend, layer).backward(dy, x, hidden, grads);
}

template <typename B, typename E>
void add_expert_ops(Library& m) {
  SAMOE_IMPL(m, "grouped_mlp", grouped_mlp<B, E>);
  SAMOE_IMPL(m, "grouped_mlp_backward", grouped_mlp_backward<B, E>);
}

}  // namespace samoe
