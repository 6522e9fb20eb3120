// CPU implementation of the cross-entropy ops: checks, allocation, launch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../common/check.h"
#include "../kernels/kernels.h"

namespace {

using at::Tensor;

int threads_for(int64_t num_tokens, int64_t width) {
  const int64_t useful = num_tokens * width / 16384;  // exponentials that pay for waking a thread
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({useful, num_tokens, at::get_num_threads()})));
}

samoe::DType dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? samoe::DType::f32 : samoe::DType::bf16;
}

void check_tokens(const Tensor& tensor, const char* name, const Tensor& logits, at::ScalarType dtype) {
  samoe::check_contiguous(tensor, name, 1, dtype);
  TORCH_CHECK_VALUE(tensor.size(0) == logits.size(0), name, " has ", tensor.size(0), " tokens, the logits ",
                    logits.size(0));
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_parts(const Tensor& logits, const Tensor& labels, int64_t first_id) {
  samoe::check_rows(logits, "logits");
  check_tokens(labels, "labels", logits, at::kLong);
  const auto options = logits.options().dtype(at::kFloat);
  const int64_t num_tokens = logits.size(0), width = logits.size(1);
  Tensor peak = at::empty({num_tokens}, options), sum = at::empty({num_tokens}, options);
  Tensor target = at::empty({num_tokens}, options);
  samoe::cpu::kernels().cross_entropy_forward({dtype_of(logits), logits.const_data_ptr(),
                                               labels.const_data_ptr<int64_t>(), num_tokens, width, first_id,
                                               peak.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(),
                                               target.mutable_data_ptr<float>(), threads_for(num_tokens, width)});
  return {peak, sum, target};
}

Tensor cross_entropy_backward(const Tensor& logits, const Tensor& labels, int64_t first_id, const Tensor& logsumexp,
                              const Tensor& dloss) {
  samoe::check_rows(logits, "logits");
  check_tokens(labels, "labels", logits, at::kLong);
  check_tokens(logsumexp, "logsumexp", logits, at::kFloat);
  check_tokens(dloss, "dloss", logits, at::kFloat);
  const int64_t num_tokens = logits.size(0), width = logits.size(1);
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  samoe::cpu::kernels().cross_entropy_backward({dtype_of(logits), logits.const_data_ptr(),
                                                labels.const_data_ptr<int64_t>(), logsumexp.const_data_ptr<float>(),
                                                dloss.const_data_ptr<float>(), num_tokens, width, first_id,
                                                dlogits.mutable_data_ptr(), threads_for(num_tokens, width)});
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  m.impl("cross_entropy_parts", cross_entropy_parts);
  m.impl("cross_entropy_backward", cross_entropy_backward);
}
