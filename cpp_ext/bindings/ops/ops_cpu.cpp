// CPU implementations of the ops that every backend shares, and of the loss and the optimizer, which torch does on others.
#include "adamw.h"
#include "../cpu_backend.h"
#include "cross_entropy.h"
#include "moe.h"
#include "swiglu.h"

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  samoe::ops::add_moe_ops<samoe::CpuBackend>(m);
  samoe::ops::add_cross_entropy_ops(m);
  samoe::ops::add_swiglu_ops<samoe::CpuBackend>(m);
  samoe::ops::add_optimizer_ops(m);
}
