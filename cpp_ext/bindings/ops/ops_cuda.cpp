// CUDA implementations of the ops that every backend shares.
#include "../cuda_backend.h"
#include "moe.h"
#include "swiglu.h"

SAMOE_CUDA_LIBRARY_IMPL(m) {
  samoe::ops::add_moe_ops<samoe::CudaBackend>(m);
  samoe::ops::add_swiglu_ops<samoe::CudaBackend>(m);
}
