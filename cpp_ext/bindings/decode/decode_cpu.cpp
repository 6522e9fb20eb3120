// CPU implementation of inference.
#include "../cpu_backend.h"
#include "many_tokens.h"
#include "ops.h"

namespace {

namespace cpu = samoe::cpu;
using samoe::decode::Scratch;

class CpuDecode : public samoe::CpuBackend {
 public:
  using samoe::CpuBackend::CpuBackend;

  void norm(const cpu::DecodeNorm& a) const { cpu::kernels().decode_norm(a); }
  void linear(const cpu::DecodeLinear& a) const { samoe::decode::run_linear(a); }
  void attention(const cpu::DecodeAttention& a, int64_t, int64_t, int64_t, const Scratch&) const {
    cpu::kernels().decode_attention(a);
  }
  void choose(const cpu::DecodeChoice& a, const Scratch&) const { cpu::kernels().decode_choose(a); }
  void choose_only_expert(int64_t num_tokens, int64_t* ids_T, float* probs_T) const {
    for (int64_t t = 0; t < num_tokens; ++t) ids_T[t] = 0, probs_T[t] = 1.0f;
  }
  void experts(const cpu::DecodeExperts& a, int64_t, int64_t, const Scratch&) const {
    samoe::decode::run_experts(a);
  }
  void combine_rows(const cpu::CombineRows& a) const { cpu::kernels().combine_rows(a); }
};

}  // namespace

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) { samoe::decode::add_decode_ops<CpuDecode>(m); }
