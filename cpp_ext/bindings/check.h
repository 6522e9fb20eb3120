// Checks of the bindings: every tensor is looked at before its pointer goes below.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace samoe {

// The checks of one call of an op, for every backend: all its tensors lie on one device.
class TensorChecks {
 public:
  explicit TensorChecks(c10::Device device) : device_(device) {}
  // On the device of the call's first tensor, which must be of the backend's type.
  TensorChecks(c10::DeviceType type, const at::Tensor& first, const char* name) : device_(first.device()) {
    TORCH_CHECK(device_.type() == type, name, " is on ", device_, "; this op takes tensors on ", type);
  }

  c10::Device device() const { return device_; }

  // The name may come in pieces: check_device(tensor, "grads[", i, "]").
  template <typename... Name>
  void check_device(const at::Tensor& tensor, const Name&... name) const {
    TORCH_CHECK(tensor.device() == device_, name..., " is on ", tensor.device(), "; this op takes tensors on ",
                device_);
  }

  void check_tensor(const at::Tensor& tensor, const char* name, int64_t dims, at::ScalarType dtype) const {
    check_device(tensor, name);
    TORCH_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dims, not ", dims);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), ", not ", dtype);
  }

  void check_contiguous(const at::Tensor& tensor, const char* name, int64_t dims, at::ScalarType dtype) const {
    check_tensor(tensor, name, dims, dtype);
    TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  }

  // Contiguous, and of these very sizes.
  void check_sizes(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) const {
    check_contiguous(tensor, name, static_cast<int64_t>(sizes.size()), dtype);
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " is ", tensor.sizes(), ", not ", sizes);
  }
  // Where it is given.
  void check_sizes(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes,
                   at::ScalarType dtype) const {
    if (tensor.has_value()) check_sizes(*tensor, name, sizes, dtype);
  }

  void check_rows(const at::Tensor& tensor, const char* name) const {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, name, " is ",
                     tensor.scalar_type(), ", not Float or BFloat16");
    check_contiguous(tensor, name, 2, tensor.scalar_type());
  }

 private:
  c10::Device device_;
};

// For ops of the CPU alone.
inline void check_contiguous(const at::Tensor& tensor, const char* name, int64_t dims, at::ScalarType dtype) {
  TensorChecks(c10::kCPU).check_contiguous(tensor, name, dims, dtype);
}

// Every entry of an index in host memory must name a row: a wrong one would read foreign memory.
inline void check_index(const at::Tensor& index, const char* name, int64_t low, int64_t high) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  const int64_t num = index.numel();
  bool bad = false;
  for (int64_t i = 0; i < num; ++i) bad |= values[i] < low || values[i] >= high;
  TORCH_CHECK_INDEX(!bad, name, " has an entry outside ", low, " to ", high - 1);
}

}  // namespace samoe
