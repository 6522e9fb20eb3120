// Checks of the bindings: every tensor is looked at before its pointer goes below.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace samoe {

inline void check_tensor(const at::Tensor& tensor, const char* name, int64_t dims, at::ScalarType dtype) {
  TORCH_CHECK(tensor.device().is_cpu(), name, " is on ", tensor.device(), "; this op takes CPU tensors");
  TORCH_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dims, not ", dims);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), ", not ", dtype);
}

inline void check_contiguous(const at::Tensor& tensor, const char* name, int64_t dims, at::ScalarType dtype) {
  check_tensor(tensor, name, dims, dtype);
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

inline void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, name, " is ",
                   tensor.scalar_type(), ", not Float or BFloat16");
  check_contiguous(tensor, name, 2, tensor.scalar_type());
}

}  // namespace samoe
