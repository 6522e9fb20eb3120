// All that the bindings use of torch: LibTorch's stable ABI, under short names. So one library serves every torch from
// 2.11 on, and every Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

// torch's macros paste their arguments: one more step has those that are macros themselves expanded before.
#define SAMOE_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
// Registers a function, whatever it takes and returns: the ABI knows boxed functions alone.
#define SAMOE_IMPL(m, name, ...) (m).impl(name, TORCH_BOX((&__VA_ARGS__)))

// A RuntimeError of Python: what other exceptions become depends on the release of torch.
#define SAMOE_CHECK(condition, ...) \
  ((condition) ? static_cast<void>(0) : throw std::runtime_error(::samoe::text(__VA_ARGS__)))

namespace samoe {

using Device = torch::stable::Device;
using DeviceType = torch::headeronly::DeviceType;
using Library = torch::stable::detail::StableLibrary;
using ScalarType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Tensor = torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr ScalarType kBFloat16 = ScalarType::BFloat16, kByte = ScalarType::Byte, kChar = ScalarType::Char,
                     kDouble = ScalarType::Double, kFloat = ScalarType::Float, kInt = ScalarType::Int,
                     kLong = ScalarType::Long, kShort = ScalarType::Short;

// How errors name things.
inline std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << "[";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  return out << "]";
}
inline std::ostream& operator<<(std::ostream& out, DeviceType type) {
  if (type == DeviceType::CPU) return out << "cpu";
  if (type == DeviceType::CUDA) return out << "cuda";
  return out << "device type " << static_cast<int>(type);
}
inline std::ostream& operator<<(std::ostream& out, const Device& device) {
  out << device.type();
  return device.has_index() && !device.is_cpu() ? out << ":" << device.index() : out;
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline int64_t nbytes(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

// A new tensor, contiguous; its dtype and device are another's where nothing else is said.
inline Tensor uninitialized(Sizes sizes, ScalarType dtype, const Device& device) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &made));
  return Tensor(made);
}
inline Tensor uninitialized(Sizes sizes, const Tensor& like, ScalarType dtype) { return uninitialized(sizes, dtype, like.device()); }
inline Tensor uninitialized(Sizes sizes, const Tensor& like) { return uninitialized(sizes, like.scalar_type(), like.device()); }

// Threads that an op may use.
inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Whether a loop is already shared by threads, so that what it calls takes none.
inline bool in_parallel_region() {
#if defined(_OPENMP)
  return omp_in_parallel();
#else
  return false;
#endif
}

}  // namespace samoe
