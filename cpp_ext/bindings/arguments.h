// Tensors as the launchers of the kernels take them.
#pragma once

#include "../kernels/kernels.h"
#include "torch_abi.h"

namespace samoe {

// Of a tensor that was checked to be fp32 or bf16.
inline DType dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == kFloat ? DType::f32 : DType::bf16;
}

template <typename T>
const T* data_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// A counting sort of slots between its two steps.
struct CountedSlots {
  Tensor cursor;  // [chunks, E]: where each chunk of slots starts to write
  int64_t num_rows;   // kept slots, or -1
  int64_t bad_id;     // the id that is no expert's where num_rows is -1
};

}  // namespace samoe
