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

// Every entry must name a row: a wrong index would read foreign memory.
inline void check_index(const at::Tensor& index, const char* name, int64_t low, int64_t high) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  const int64_t num = index.numel();
  bool bad = false;
  for (int64_t i = 0; i < num; ++i) bad |= values[i] < low || values[i] >= high;
  TORCH_CHECK_INDEX(!bad, name, " has an entry outside ", low, " to ", high - 1);
}

}  // namespace samoe
