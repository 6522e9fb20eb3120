// Checks of the bindings: every tensor is looked at before its pointer goes below.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "torch_abi.h"

namespace samoe {

// Counts (of experts, of groups times experts) that an op makes though no tensor is as large.
constexpr int64_t kMostCounts = int64_t{1} << 20;
// What the sizes of a tensor without elements may come to, where 1 stands for 0: it has no memory that bounds them, and
// products of them would wrap round.
constexpr int64_t kMostPlaces = INT32_MAX - 1;

// For all numbers that come from outside and are no tensor's size.
inline void check_range(int64_t value, const char* name, int64_t low, int64_t high) {
  SAMOE_CHECK(value >= low && value <= high, name, " = ", value, ": from ", low, " to ", high);
}

// Of numbers that are not negative. It must not wrap round: what is compared with it would be wrong.
inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors)
    SAMOE_CHECK(!__builtin_mul_overflow(result, factor, &result), "the product of ",
                Sizes(factors.begin(), factors.size()), " is too large");
  return result;
}

// The checks of one call of an op, for every backend: all its tensors lie on one device.
class TensorChecks {
 public:
  explicit TensorChecks(Device device) : device_(device) {}
  // On the device of the call's first tensor, which must be of the backend's type.
  TensorChecks(DeviceType type, const Tensor& first, const char* name) : device_(first.device()) {
    SAMOE_CHECK(device_.type() == type, name, " is on ", device_, "; this op takes tensors on ", type);
  }

  Device device() const { return device_; }

  // The name may come in pieces: check_device(tensor, "grads[", i, "]").
  template <typename... Name>
  void check_device(const Tensor& tensor, const Name&... name) const {
    SAMOE_CHECK(tensor.device() == device_, name..., " is on ", tensor.device(), "; this op takes tensors on ",
                device_);
    if (tensor.numel() != 0) return;
    int64_t left = kMostPlaces;
    for (const int64_t size : tensor.sizes()) left /= size > 1 ? size : 1;
    SAMOE_CHECK(left > 0, name..., " is ", tensor.sizes(), "; sizes without elements come to at most ", kMostPlaces);
  }

  void check_tensor(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) const {
    check_device(tensor, name);
    SAMOE_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dims, not ", dims);
    SAMOE_CHECK(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), ", not ", dtype);
  }

  void check_contiguous(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) const {
    check_tensor(tensor, name, dims, dtype);
    SAMOE_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  }

  // Contiguous, and of these very sizes.
  void check_sizes(const Tensor& tensor, const char* name, Sizes sizes, ScalarType dtype) const {
    check_contiguous(tensor, name, static_cast<int64_t>(sizes.size()), dtype);
    SAMOE_CHECK(tensor.sizes().equals(sizes), name, " is ", tensor.sizes(), ", not ", sizes);
  }
  // Where it is given.
  void check_sizes(const MaybeTensor& tensor, const char* name, Sizes sizes,
                   ScalarType dtype) const {
    if (tensor.has_value()) check_sizes(*tensor, name, sizes, dtype);
  }

  void check_rows(const Tensor& tensor, const char* name) const {
    SAMOE_CHECK(tensor.scalar_type() == kFloat || tensor.scalar_type() == kBFloat16, name, " is ",
                     tensor.scalar_type(), ", not Float or BFloat16");
    check_contiguous(tensor, name, 2, tensor.scalar_type());
  }

 private:
  Device device_;
};

// For ops of the CPU alone.
inline void check_contiguous(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype) {
  TensorChecks(DeviceType::CPU).check_contiguous(tensor, name, dims, dtype);
}

// Every entry of an index in host memory must name a row: a wrong one would read foreign memory.
inline void check_index(const Tensor& index, const char* name, int64_t low, int64_t high) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  const int64_t num = index.numel();
  bool bad = false;
  for (int64_t i = 0; i < num; ++i) bad |= values[i] < low || values[i] >= high;
  SAMOE_CHECK(!bad, name, " has an entry outside ", low, " to ", high - 1);
}

}  // namespace samoe
