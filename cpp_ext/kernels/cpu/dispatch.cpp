// Chooses the kernels' instruction set once, from what this CPU has.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

namespace samoe {
namespace cpu {

#define SAMOE_DECLARE(isa)                                    \
  namespace isa {                                             \
  void gate_forward(const GateForward&);                      \
  void gate_backward(const GateBackward&);                    \
  void gather_rows(const GatherRows&);                        \
  void unpermute(const Unpermute&);                           \
  void unpermute_backward(const UnpermuteBackward&);          \
  void copy_streamed(const char*, char*, int64_t);            \
  void combine(const Combine&);                               \
  void combine_backward(const CombineBackward&);              \
  void cross_entropy_forward(const CrossEntropyForward&);     \
  void cross_entropy_backward(const CrossEntropyBackward&);   \
  void activate(const Activate&);                             \
  void activate_backward(const ActivateBackward&);            \
  void column_sums(const ColumnSums&);                        \
  void convert(const Convert&);                               \
  void add_bias(const AddBias&);                              \
  bool has_bf16_product();                                    \
  int64_t bf16_product_work(const Bf16Product&);              \
  void bf16_product(const Bf16Product&, void*);               \
  void adamw(const AdamW&);                                   \
  void decode_linear(const DecodeLinear&);                    \
  void decode_norm(const DecodeNorm&);                        \
  void decode_attention(const DecodeAttention&);              \
  void decode_experts(const DecodeExperts&);                  \
  void combine_rows(const CombineRows&);                      \
  void decode_step(const DecodeStep&);                        \
  }                                                           \
  static const Kernels k_##isa = {#isa,                       \
                                  isa::gate_forward,          \
                                  isa::gate_backward,         \
                                  isa::gather_rows,           \
                                  isa::unpermute,             \
                                  isa::unpermute_backward,    \
                                  isa::copy_streamed,         \
                                  isa::combine,               \
                                  isa::combine_backward,      \
                                  isa::cross_entropy_forward, \
                                  isa::cross_entropy_backward, \
                                  isa::activate,              \
                                  isa::activate_backward,     \
                                  isa::column_sums,           \
                                  isa::convert,               \
                                  isa::add_bias,              \
                                  isa::has_bf16_product,      \
                                  isa::bf16_product_work,     \
                                  isa::bf16_product,          \
                                  isa::adamw,                 \
                                  isa::decode_linear,         \
                                  isa::decode_norm,           \
                                  isa::decode_attention,      \
                                  isa::decode_experts,        \
                                  isa::combine_rows,          \
                                  isa::decode_step};

SAMOE_DECLARE(portable)
#if defined(SAMOE_WITH_X86_SETS)
SAMOE_DECLARE(avx2)
SAMOE_DECLARE(avx512)
#endif

namespace {

const Kernels* choose() {
#if defined(SAMOE_WITH_X86_SETS)
  const char* asked = std::getenv("MEGATRON_SAMOE_ISA");
  const bool allow_avx512 = asked == nullptr || std::strcmp(asked, "avx512") == 0;
  const bool allow_avx2 = allow_avx512 || std::strcmp(asked, "avx2") == 0;
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return &k_avx512;
  }
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &k_avx2;
#endif
  return &k_portable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace cpu
}  // namespace samoe
