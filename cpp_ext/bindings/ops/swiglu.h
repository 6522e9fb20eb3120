// SwiGLU of rows that lie together, for every backend: checks, allocation, launch.
#pragma once

#include <tuple>

#include "../arguments.h"
#include "../check.h"

namespace samoe {
namespace ops {

// Returns the width of the activation of hidden [R, 2 F].
template <typename B>
int64_t gated_width(const B& backend, const Tensor& hidden) {
  backend.check_rows(hidden, "hidden");
  SAMOE_CHECK(hidden.size(1) % 2 == 0, "hidden has ", hidden.size(1), " columns: a gate and as many more");
  return hidden.size(1) / 2;
}

template <typename B>
Tensor swiglu(const Tensor& hidden) {
  const B backend(hidden, "hidden");
  const int64_t num_rows = hidden.size(0), width = gated_width(backend, hidden);
  const DType dtype = dtype_of(hidden);
  Tensor activation = uninitialized({num_rows, width}, hidden);
  backend.swiglu({dtype, dtype, hidden.const_data_ptr(), nullptr, num_rows, width, true, nullptr, activation.mutable_data_ptr()});
  return activation;
}

template <typename B>
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dactivation, const Tensor& hidden) {
  const B backend(hidden, "hidden");
  const int64_t num_rows = hidden.size(0), width = gated_width(backend, hidden);
  backend.check_sizes(dactivation, "dactivation", {num_rows, width}, hidden.scalar_type());
  const DType dtype = dtype_of(hidden);
  Tensor dhidden = uninitialized(hidden.sizes(), hidden), activation = uninitialized({num_rows, width}, hidden);
  backend.swiglu_backward({dtype, dtype, hidden.const_data_ptr(), nullptr, dactivation.const_data_ptr(), num_rows, width,
                           true, activation.mutable_data_ptr(), dhidden.mutable_data_ptr()});
  return {dhidden, activation};
}

template <typename B>
void add_swiglu_ops(Library& m) {
  SAMOE_IMPL(m, "swiglu", swiglu<B>);
  SAMOE_IMPL(m, "swiglu_backward", swiglu_backward<B>);
}

}  // namespace ops
}  // namespace samoe
