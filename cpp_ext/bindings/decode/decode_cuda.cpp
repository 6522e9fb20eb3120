// CUDA implementation of inference.
#include "../cuda_backend.h"
#include "ops.h"

namespace {

namespace cpu = samoe::cpu;
namespace cuda = samoe::cuda;
using samoe::decode::Scratch;

class CudaDecode : public samoe::CudaBackend {
 public:
  using samoe::CudaBackend::CudaBackend;

  void norm(const cpu::DecodeNorm& a) const { launch(cuda::decode_norm, a); }
  void linear(const cpu::DecodeLinear& a) const { launch(cuda::decode_linear, a); }
  // What is left of the scratch lets parts of long sequences run side by side.
  void attention(const cpu::DecodeAttention& a, int64_t num_slots, int64_t num_pages, int64_t num_angles,
                 const Scratch& pieces) const {
    TORCH_CHECK_VALUE(a.head_dim >= 1 && a.head_dim <= cuda::kMaxHeadDim, "a head of ", a.head_dim, ", of at most ",
                      cuda::kMaxHeadDim, " on a GPU");
    launch(cuda::decode_attention, a, cuda::CacheBounds{num_slots, num_pages, num_angles}, pieces.rest(),
           pieces.num_left());
  }
  void choose(const cpu::GateForward& a, Scratch& pieces) const {
    launch(cuda::gate_forward, a, pieces.bytes(cuda::gate_workspace_bytes(a)));
  }
  void choose_only_expert(int64_t num_tokens, int64_t* ids_T, float* probs_T) const {
    launch(cuda::choose_only_expert, num_tokens, ids_T, probs_T);
  }
  void experts(const cpu::DecodeExperts& a, int64_t num_w1, int64_t num_w2, Scratch& pieces) const {
    launch(cuda::decode_experts, a, num_w1, num_w2, pieces.bytes(cuda::decode_experts_workspace_bytes(a)));
  }
  void combine_rows(const cpu::CombineRows& a) const {
    TORCH_CHECK_VALUE(a.num_banks <= cuda::kMaxDecodeBanks, a.num_banks, " banks, of at most ", cuda::kMaxDecodeBanks,
                      " on a GPU");
    launch(cuda::combine_rows, a);
  }
};

}  // namespace

SAMOE_CUDA_LIBRARY_IMPL(m) { samoe::decode::add_decode_ops<CudaDecode>(m); }
