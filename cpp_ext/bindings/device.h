// The current device and stream of a GPU, by torch's stable ABI.
#pragma once

#include <dlfcn.h>

#include "torch_abi.h"

namespace samoe {

// A tensor's device is the current one as long as this lives.
class DeviceScope {
 public:
  explicit DeviceScope(const Device& device) {
    if (!device.is_cpu()) guard_.emplace(device.index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The stream that torch uses on a device; null on the CPU. Found at run time: a CPU build of torch has no such function.
inline void* current_stream(const Device& device) {
  if (device.is_cpu()) return nullptr;
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  SAMOE_CHECK(function != nullptr, "torch has no streams on ", device);
  void* stream = nullptr;
  SAMOE_CHECK(function(device.index(), &stream) == AOTI_TORCH_SUCCESS, "torch names no current stream of ", device);
  return stream;
}

}  // namespace samoe
