// Linear layers and experts of inference on a CPU. Few tokens stream the weights through the kernels; many are whole
// products of the BLAS, where ops/cpu_products.py says that these are faster. Activations are fp32 in either way.
#pragma once

#include "../../kernels/kernels.h"

namespace samoe {
namespace decode {

// Whether so many tokens take whole products with weights of a type.
bool takes_products(WeightType type, int64_t num_tokens);
void run_linear(const cpu::DecodeLinear& a);
void run_experts(const cpu::DecodeExperts& a);

}  // namespace decode
}  // namespace samoe
