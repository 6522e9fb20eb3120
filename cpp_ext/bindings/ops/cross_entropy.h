// The cross-entropy ops on a CPU: checks, allocation, launch.
#pragma once

#include <tuple>

#include "../cpu_backend.h"

namespace samoe {
namespace ops {

constexpr int64_t kExponentialsPerThread = 16384;  // that pay for waking a thread

inline std::tuple<Tensor, Tensor, Tensor> cross_entropy_parts(const Tensor& logits, const Tensor& labels, int64_t first_id) {
  const CpuBackend backend(logits, "logits");
  backend.check_rows(logits, "logits");
  backend.check_sizes(labels, "labels", {logits.size(0)}, kLong);
  const int64_t num_tokens = logits.size(0), width = logits.size(1);
  check_range(first_id, "first_id", 0, INT64_MAX - width);
  Tensor peak = uninitialized({num_tokens}, logits, kFloat), sum = uninitialized({num_tokens}, logits, kFloat);
  Tensor target = uninitialized({num_tokens}, logits, kFloat);
  backend.cross_entropy_forward({dtype_of(logits), logits.const_data_ptr(), labels.const_data_ptr<int64_t>(),
                                 num_tokens, width, first_id, peak.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(),
                                 target.mutable_data_ptr<float>(),
                                 backend.threads(num_tokens * width, kExponentialsPerThread, num_tokens)});
  return {peak, sum, target};
}

inline Tensor cross_entropy_backward(const Tensor& logits, const Tensor& labels, int64_t first_id, const Tensor& logsumexp,
                              const Tensor& dloss) {
  const CpuBackend backend(logits, "logits");
  backend.check_rows(logits, "logits");
  backend.check_sizes(labels, "labels", {logits.size(0)}, kLong);
  backend.check_sizes(logsumexp, "logsumexp", {logits.size(0)}, kFloat);
  backend.check_sizes(dloss, "dloss", {logits.size(0)}, kFloat);
  const int64_t num_tokens = logits.size(0), width = logits.size(1);
  check_range(first_id, "first_id", 0, INT64_MAX - width);
  Tensor dlogits = uninitialized(logits.sizes(), logits);
  backend.cross_entropy_backward({dtype_of(logits), logits.const_data_ptr(), labels.const_data_ptr<int64_t>(),
                                  logsumexp.const_data_ptr<float>(), dloss.const_data_ptr<float>(), num_tokens, width,
                                  first_id, dlogits.mutable_data_ptr(),
                                  backend.threads(num_tokens * width, kExponentialsPerThread, num_tokens)});
  return dlogits;
}

inline void add_cross_entropy_ops(Library& m) {
  SAMOE_IMPL(m, "cross_entropy_parts", cross_entropy_parts);
  SAMOE_IMPL(m, "cross_entropy_backward", cross_entropy_backward);
}

}  // namespace ops
}  // namespace samoe
