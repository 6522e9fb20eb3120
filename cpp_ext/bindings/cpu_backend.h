// The CPU as the ops see it: checks, threads, and the kernels of the best instruction set.
#pragma once

#include <algorithm>
#include <climits>

#include "check.h"
#include "arguments.h"

namespace samoe {

class CpuBackend : public TensorChecks {
 public:
  CpuBackend(const Tensor& first, const char* name) : TensorChecks(DeviceType::CPU, first, name) {}

  // As many threads as have enough to do that waking them pays, at most `limit`, at least one. Work is in bytes, or in
  // what per_thread counts.
  int threads(int64_t work, int64_t per_thread = 64 << 10, int64_t limit = INT_MAX) const {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({work / per_thread, limit, num_threads()})));
  }
  void check_index(const Tensor& index, const char* name, int64_t low, int64_t high) const {
    samoe::check_index(index, name, low, high);
  }

  void gate_forward(const cpu::GateForward& a) const { cpu::kernels().gate_forward(a); }
  void gate_backward(const cpu::GateBackward& a) const { cpu::kernels().gate_backward(a); }
  void gather_rows(const cpu::GatherRows& a, int64_t /*num_sources*/) const { cpu::kernels().gather_rows(a); }
  void unpermute(const cpu::Unpermute& a, int64_t /*num_rows*/) const { cpu::kernels().unpermute(a); }
  void unpermute_backward(const cpu::UnpermuteBackward& a, int64_t /*num_rows*/) const {
    cpu::kernels().unpermute_backward(a);
  }
  void combine(const cpu::Combine& a) const { cpu::kernels().combine(a); }
  void combine_backward(const cpu::CombineBackward& a) const { cpu::kernels().combine_backward(a); }
  void cross_entropy_forward(const cpu::CrossEntropyForward& a) const { cpu::kernels().cross_entropy_forward(a); }
  void cross_entropy_backward(const cpu::CrossEntropyBackward& a) const { cpu::kernels().cross_entropy_backward(a); }
  void swiglu(const cpu::Activate& a) const { cpu::kernels().activate(a); }
  void swiglu_backward(const cpu::ActivateBackward& a) const { cpu::kernels().activate_backward(a); }
  void adamw(const cpu::AdamW& a) const { cpu::kernels().adamw(a); }

  CountedSlots count_slots(const Tensor& ids, const Tensor& counts, const Tensor& ends) const {
    const int64_t num_slots = ids.numel(), num_experts = counts.size(0);
    const int64_t chunks = cpu::num_slot_chunks(num_slots, num_experts, num_threads());
    CountedSlots slots{uninitialized({chunks, num_experts}, ids), 0, 0};
    slots.num_rows = cpu::count_slots(ids.const_data_ptr<int64_t>(), num_slots, num_experts, chunks,
                                      counts.mutable_data_ptr<int64_t>(), slots.cursor.mutable_data_ptr<int64_t>(),
                                      &slots.bad_id, static_cast<int>(chunks));
    int64_t end = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      end += counts.const_data_ptr<int64_t>()[e];
      ends.mutable_data_ptr<int32_t>()[e] = static_cast<int32_t>(end);
    }
    return slots;
  }
  void place_slots(const Tensor& ids, const CountedSlots& slots, const Tensor& slot_of_row,
                   const Tensor& row_of_slot) const {
    const int64_t chunks = slots.cursor.size(0);
    cpu::place_slots(ids.const_data_ptr<int64_t>(), ids.numel(), slots.cursor.size(1), chunks,
                     slots.cursor.mutable_data_ptr<int64_t>(), slot_of_row.mutable_data_ptr<int64_t>(),
                     row_of_slot.mutable_data_ptr<int64_t>(), static_cast<int>(chunks));
  }
};

}  // namespace samoe
