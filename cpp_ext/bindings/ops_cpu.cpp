// CPU implementations of the ops that every backend shares.
#include "adamw_ops.h"
#include "cpu_backend.h"
#include "cross_entropy_ops.h"
#include "moe_ops.h"

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  samoe::ops::add_moe_ops<samoe::CpuBackend>(m);
  samoe::ops::add_cross_entropy_ops<samoe::CpuBackend>(m);
  samoe::ops::add_adamw_op<samoe::CpuBackend>(m);
}
