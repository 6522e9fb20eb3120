// Linear layers and experts of inference on a CPU. Few tokens stream the weights through the kernels, with activations in
// fp32; many take whole products where ops/cpu_products.py says that these are faster, and with weights in bf16 round
// activations to bf16 for them, unless the way of bf16 is fp32.
#pragma once

#include "../../kernels/kernels.h"

namespace samoe {
namespace decode {

void run_linear(const cpu::DecodeLinear& a);
void run_experts(const cpu::DecodeExperts& a);

}  // namespace decode
}  // namespace samoe
