"""An op: sqrt(softplus(x)) with a slow twin, a CPU and a CUDA kernel (sqrt_softplus.cpp), and a router that scores by it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.moe.router import Router
from megatron_samoe.ops.topk_gate import GateResult, described

SOURCE = Path(__file__).with_name("sqrt_softplus.cpp")
COMPILERS = {"cpu": ["g++", "-fPIC"], "cuda": ["nvcc", "-x", "cu", "-arch=all-major", "-Xcompiler", "-fPIC"]}


def reference(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


@cache
def kernels(device_type: str) -> ctypes.CDLL:
    """Returns the kernels of a kind of device, compiled once on a machine, whichever of its ranks is first."""
    built = Path(tempfile.gettempdir()) / f"sqrt_softplus-{os.getuid()}-{SOURCE.stat().st_mtime_ns}-{device_type}.so"
    if not built.exists():
        own = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILERS[device_type], "-O3", "-shared", "-o", own, SOURCE], check=True)
        own.rename(built)
    return ctypes.CDLL(str(built))


def launch(name: str, *inputs: Tensor) -> Tensor:
    """Returns what a kernel makes of fp32 tensors of one shape."""
    tensors = [torch.empty_like(inputs[0], memory_format=torch.contiguous_format), *(t.contiguous() for t in inputs)]
    device, pointers = tensors[0].device, [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    getattr(kernels(device.type), name)(*pointers, ctypes.c_int64(tensors[0].numel()), ctypes.c_void_p(stream))
    return tensors[0]


sqrt_softplus = torch.library.custom_op(
    "outside::sqrt_softplus", lambda x: launch("forward", x), mutates_args=(), schema="(Tensor x) -> Tensor"
)
sqrt_softplus_backward = torch.library.custom_op(
    "outside::sqrt_softplus_backward",
    lambda x, dy: launch("backward", x, dy),
    mutates_args=(),
    schema="(Tensor x, Tensor dy) -> Tensor",
)
sqrt_softplus.register_fake(lambda x: x.new_empty(x.shape))
sqrt_softplus_backward.register_fake(lambda x, dy: x.new_empty(x.shape))
sqrt_softplus.register_autograd(
    lambda ctx, dy: sqrt_softplus_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class SqrtSoftplusRouter(Router):
    """Takes the K best experts, weighed by their scores, which sum to 1."""

    def select(self, logits_TE: Tensor, num_sequences: int) -> GateResult:
        scores_TK, ids_TK = sqrt_softplus(logits_TE).topk(self.config.moe_router_topk)
        return described(logits_TE, ids_TK, scores_TK / scores_TK.sum(-1, keepdim=True), num_sequences)
