// The cross-entropy ops for every backend: checks, allocation, launch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../check.h"
#include "../arguments.h"

namespace samoe {
namespace ops {

using at::Tensor;

constexpr int64_t kExponentialsPerThread = 16384;  // that pay for waking a thread

template <typename B>
std::tuple<Tensor, Tensor, Tensor> cross_entropy_parts(const Tensor& logits, const Tensor& labels, int64_t first_id) {
  const B backend(logits, "logits");
  backend.check_rows(logits, "logits");
  backend.check_sizes(labels, "labels", {logits.size(0)}, at::kLong);
  const auto options = logits.options().dtype(at::kFloat);
  const int64_t num_tokens = logits.size(0), width = logits.size(1);
  Tensor peak = at::empty({num_tokens}, options), sum = at::empty({num_tokens}, options);
  Tensor target = at::empty({num_tokens}, options);
  backend.cross_entropy_forward({dtype_of(logits), logits.const_data_ptr(), labels.const_data_ptr<int64_t>(),
                                 num_tokens, width, first_id, peak.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(),
                                 target.mutable_data_ptr<float>(),
                                 backend.threads(num_tokens * width, kExponentialsPerThread, num_tokens)});
  return {peak, sum, target};
}

template <typename B>
Tensor cross_entropy_backward(const Tensor& logits, const Tensor& labels, int64_t first_id, const Tensor& logsumexp,
                              const Tensor& dloss) {
  const B backend(logits, "logits");
  backend.check_rows(logits, "logits");
  backend.check_sizes(labels, "labels", {logits.size(0)}, at::kLong);
  backend.check_sizes(logsumexp, "logsumexp", {logits.size(0)}, at::kFloat);
  backend.check_sizes(dloss, "dloss", {logits.size(0)}, at::kFloat);
  const int64_t num_tokens = logits.size(0), width = logits.size(1);
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  backend.cross_entropy_backward({dtype_of(logits), logits.const_data_ptr(), labels.const_data_ptr<int64_t>(),
                                  logsumexp.const_data_ptr<float>(), dloss.const_data_ptr<float>(), num_tokens, width,
                                  first_id, dlogits.mutable_data_ptr(),
                                  backend.threads(num_tokens * width, kExponentialsPerThread, num_tokens)});
  return dlogits;
}

template <typename B>
void add_cross_entropy_ops(torch::Library& m) {
  m.impl("cross_entropy_parts", cross_entropy_parts<B>);
  m.impl("cross_entropy_backward", cross_entropy_backward<B>);
}

}  // namespace ops
}  // namespace samoe
