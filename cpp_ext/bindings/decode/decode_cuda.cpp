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
    SAMOE_CHECK(a.head_dim >= 1 && a.head_dim <= cuda::kMaxHeadDim, "a head of ", a.head_dim, ", of at most ",
                      cuda::kMaxHeadDim, " on a GPU");
    launch(cuda::decode_attention, a, cuda::CacheBounds{num_slots, num_pages, num_angles}, pieces.rest(),
           pieces.num_left());
  }
  void choose(const cpu::DecodeChoice& a, Scratch& pieces) const {
    SAMOE_CHECK(a.norm_scale == nullptr && a.bias_E == nullptr && a.candidates_E == nullptr && a.num_groups == 0 &&
                    a.mixing_T2 == nullptr && a.factor == 1.0f,
                "a GPU chooses by logits alone");
    int64_t* counts = pieces.integers({a.num_experts});
    float* sums = pieces.floats({a.num_experts});
    float* z_sum = pieces.floats({1});
    float* logsumexp = pieces.floats({a.num_tokens});
    const cpu::GateForward gate = {a.logits_TE, a.num_tokens, a.num_experts, a.topk, 1,     a.sigmoid, a.pre_softmax,
                                   a.probs_TK,  a.ids_TK,     counts,        sums,   z_sum, logsumexp, a.num_threads};
    launch(cuda::gate_forward, gate, pieces.bytes(cuda::gate_workspace_bytes(gate)));
  }
  void choose_only_expert(int64_t num_tokens, int64_t* ids_T, float* probs_T) const {
    launch(cuda::choose_only_expert, num_tokens, ids_T, probs_T);
  }
  void experts(const cpu::DecodeExperts& a, int64_t num_w1, int64_t num_w2, Scratch& pieces) const {
    launch(cuda::decode_experts, a, num_w1, num_w2, pieces.bytes(cuda::decode_experts_workspace_bytes(a)));
  }
  void combine_rows(const cpu::CombineRows& a) const {
    SAMOE_CHECK(a.num_banks <= cuda::kMaxDecodeBanks, a.num_banks, " banks, of at most ", cuda::kMaxDecodeBanks,
                      " on a GPU");
    launch(cuda::combine_rows, a);
  }
};

}  // namespace

SAMOE_CUDA_LIBRARY_IMPL(m) { samoe::decode::add_decode_ops<CudaDecode>(m); }
