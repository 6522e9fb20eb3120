// Launchers of the CUDA kernels on raw device pointers: no torch and no CUDA header below this line.
//
// Arguments are those of the CPU kernels, whose meaning is the same; num_threads is not read. Work runs on the given
// stream of the current device, and `workspace` is device memory of the size that the function before it tells, which
// the stream must still own when the kernels run. Nothing here waits for the device. Sums of floats are made without
// atomics in an order that depends on shapes alone: equal inputs give equal bits.
#pragma once

#include "../kernels.h"

struct CUstream_st;
typedef CUstream_st* cudaStream_t;

namespace samoe {
namespace cuda {

// The first error that launches of this thread met since it was last asked for; errors that others left in the thread are
// none of these.
struct LaunchError {
  const char* text;       // null: none
  bool is_of_kernel_run;  // a kernel failed while it ran, maybe an earlier one; else a kernel did not start
};
LaunchError launch_error();

int64_t gate_workspace_bytes(const cpu::GateForward& a);
void gate_forward(const cpu::GateForward& a, void* workspace, cudaStream_t stream);
// An id outside 0..E-1 stops the kernel by an assertion.
void gate_backward(const cpu::GateBackward& a, cudaStream_t stream);

// The counting sort in two steps, as on the CPU, but with a row for every slot: those of dropped slots come last, so the
// host need not know how many there are. cursor: num_slot_chunks x (E + 1). An id outside -1..E-1 stops the kernel by an
// assertion.
int64_t num_slot_chunks(int64_t num_slots);
void count_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t* counts_E, int32_t* ends_E,
                 int64_t* cursor, cudaStream_t stream);
void place_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t* cursor, int64_t* slot_of_row_S,
                 int64_t* row_of_slot_S, cudaStream_t stream);

// An index that names no row stops the kernel by an assertion: looking at it first would wait for the device.
void gather_rows(const cpu::GatherRows& a, int64_t num_sources, cudaStream_t stream);
void unpermute(const cpu::Unpermute& a, int64_t num_rows, cudaStream_t stream);
void unpermute_backward(const cpu::UnpermuteBackward& a, int64_t num_rows, cudaStream_t stream);

void combine(const cpu::Combine& c, cudaStream_t stream);
int64_t combine_backward_workspace_bytes(const cpu::CombineBackward& c);
void combine_backward(const cpu::CombineBackward& c, void* workspace, cudaStream_t stream);

// h and what comes of it are of one type, without a bias; gated.
void swiglu(const cpu::Activate& a, cudaStream_t stream);
void swiglu_backward(const cpu::ActivateBackward& a, cudaStream_t stream);

// Inference; meanings as in kernels/cpu/simd/decode_*.cpp. An expert, position, slot or page that is none stops the kernel
// by an assertion.
void decode_linear(const cpu::DecodeLinear& a, cudaStream_t stream);
void decode_norm(const cpu::DecodeNorm& a, cudaStream_t stream);

// What positions, slots and pages must lie below.
struct CacheBounds {
  int64_t num_slots, num_pages, num_angles;
};
constexpr int64_t kMaxHeadDim = 256;
// room: device memory of num_room floats, none or more, in which parts of long sequences are attended over side by side.
// The bits are the same with and without.
void decode_attention(const cpu::DecodeAttention& a, const CacheBounds& bounds, float* room, int64_t num_room,
                      cudaStream_t stream);

// num_w1, num_w2: matrices of the stacks.
int64_t decode_experts_workspace_bytes(const cpu::DecodeExperts& a);
void decode_experts(const cpu::DecodeExperts& a, int64_t num_w1, int64_t num_w2, void* workspace, cudaStream_t stream);
// All tokens take expert 0 with weight 1.
void choose_only_expert(int64_t num_tokens, int64_t* ids_T, float* probs_T, cudaStream_t stream);

constexpr int64_t kMaxDecodeBanks = 64;
void combine_rows(const cpu::CombineRows& a, cudaStream_t stream);  // banks_P lies in host memory

}  // namespace cuda
}  // namespace samoe
