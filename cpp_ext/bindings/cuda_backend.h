// A CUDA device as the ops see it: checks, the current stream, workspaces, and the kernels. Devices and streams come
// from torch's stable ABI, so that a C++ compiler suffices here.
//
// The same sources make the library of the tests, where the kernels run emulated on CPU tensors: it is compiled with
// SAMOE_CUDA_KEY=CPU and a namespace of its own.
#pragma once

#include "check.h"
#include "device.h"
#include "../kernels/cuda/launchers.h"
#include "arguments.h"

#if !defined(SAMOE_CUDA_KEY)
#define SAMOE_CUDA_KEY CUDA
#define SAMOE_CUDA_NAMESPACE megatron_samoe
#endif
#define SAMOE_CUDA_LIBRARY_IMPL(m) SAMOE_LIBRARY_IMPL(SAMOE_CUDA_NAMESPACE, SAMOE_CUDA_KEY, m)

namespace samoe {

// The device of a call's tensors is the current one as long as this lives.
class CudaBackend : public TensorChecks {
 public:
  CudaBackend(const Tensor& first, const char* name)
      : TensorChecks(DeviceType::SAMOE_CUDA_KEY, first, name), scope_(device()), stream_(static_cast<cudaStream_t>(current_stream(device()))) {}

  int threads(int64_t, int64_t = 0, int64_t = 0) const { return 0; }  // the launchers do not read it
  // The kernels look at each entry where they use it: looking here would wait for the device.
  void check_index(const Tensor&, const char*, int64_t, int64_t) const {}
  // Starts kernels on the tensors' stream.
  template <typename Launcher, typename... Arguments>
  void launch(Launcher launcher, const Arguments&... arguments) const {
    launcher(arguments..., stream_);
    const cuda::LaunchError error = cuda::launch_error();
    SAMOE_CHECK(error.text == nullptr,
                error.is_of_kernel_run ? "a CUDA kernel failed, here or earlier (CUDA_LAUNCH_BLOCKING=1 tells which): "
                                       : "a CUDA kernel did not start: ",
                error.text);
  }

  void gate_forward(const cpu::GateForward& a) const {
    const Tensor memory = workspace(cuda::gate_workspace_bytes(a));
    launch(cuda::gate_forward, a, memory.mutable_data_ptr());
  }
  void gate_backward(const cpu::GateBackward& a) const { launch(cuda::gate_backward, a); }
  void gather_rows(const cpu::GatherRows& a, int64_t num_sources) const { launch(cuda::gather_rows, a, num_sources); }
  void unpermute(const cpu::Unpermute& a, int64_t num_rows) const { launch(cuda::unpermute, a, num_rows); }
  void unpermute_backward(const cpu::UnpermuteBackward& a, int64_t num_rows) const {
    launch(cuda::unpermute_backward, a, num_rows);
  }
  void combine(const cpu::Combine& a) const { launch(cuda::combine, a); }
  void combine_backward(const cpu::CombineBackward& a) const {
    const Tensor memory = workspace(cuda::combine_backward_workspace_bytes(a));
    launch(cuda::combine_backward, a, memory.mutable_data_ptr());
  }
  void swiglu(const cpu::Activate& a) const { launch(cuda::swiglu, a); }
  void swiglu_backward(const cpu::ActivateBackward& a) const { launch(cuda::swiglu_backward, a); }

  // Every slot has a row: how many are kept only the device knows.
  CountedSlots count_slots(const Tensor& ids, const Tensor& counts, const Tensor& ends) const {
    const int64_t num_slots = ids.numel(), num_experts = counts.size(0);
    const CountedSlots slots{uninitialized({cuda::num_slot_chunks(num_slots), num_experts + 1}, ids), num_slots, 0};
    launch(cuda::count_slots, ids.const_data_ptr<int64_t>(), num_slots, num_experts, counts.mutable_data_ptr<int64_t>(),
           ends.mutable_data_ptr<int32_t>(), slots.cursor.mutable_data_ptr<int64_t>());
    return slots;
  }
  void place_slots(const Tensor& ids, const CountedSlots& slots, const Tensor& slot_of_row,
                   const Tensor& row_of_slot) const {
    launch(cuda::place_slots, ids.const_data_ptr<int64_t>(), ids.numel(), slots.cursor.size(1) - 1,
           slots.cursor.mutable_data_ptr<int64_t>(), slot_of_row.mutable_data_ptr<int64_t>(),
           row_of_slot.mutable_data_ptr<int64_t>());
  }

 private:
  // The allocator hands the memory on to later work of this stream alone.
  Tensor workspace(int64_t bytes) const { return uninitialized({bytes}, kByte, device()); }

  DeviceScope scope_;
  cudaStream_t stream_;
};

}  // namespace samoe
