"""Lets Megatron-Core train on CPUs over gloo, in a process of its own: names of devices and streams are replaced, no decision.

Import it before megatron.core, and never in the process of the tests: torch.cuda is another one afterwards.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class Queue:
    """A stream or an event of a device that has done all it was told."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "synchronize", "record", "wait"):
            return lambda *args, **kwargs: None
        if name == "record_event":
            return lambda *args, **kwargs: Queue()
        if name == "query":
            return lambda: True
        raise AttributeError(name)


def _on_cpu(device: Any) -> Any:
    return "cpu" if str(device).startswith("cuda") else device


class CudaMeansCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _on_cpu(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if getattr(function, "__name__", "") == "to":
            args = tuple(_on_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args)
        return function(*args, **kwargs)


def _replace_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.Event = Queue
    cuda.current_stream = cuda.default_stream = lambda *args: Queue()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda *args: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = (torch.default_generator,)
    cuda._lazy_call = lambda call, **kwargs: call()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, *args: None
    for name in ("Float", "Int", "Long", "Byte", "BFloat16", "Half", "Double"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    type_of = tensor.type

    def type_as_on_cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = type_of(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) and "cuda" not in found else found

    tensor.type = type_as_on_cuda
    CudaMeansCpu().__enter__()


def _take_lists_of_sizes() -> None:
    """gloo's exchange wants sizes as lists, where NCCL's also takes tensors."""
    exchange = dist.all_to_all_single

    def of_lists(output: Any, input: Any, receive: Any = None, send: Any = None, **kwargs: Any) -> Any:
        receive, send = kwargs.pop("output_split_sizes", receive), kwargs.pop("input_split_sizes", send)
        as_list = lambda sizes: sizes.tolist() if hasattr(sizes, "tolist") else sizes  # noqa: E731
        return exchange(output, input, as_list(receive), as_list(send), **kwargs)

    dist.all_to_all_single = of_lists


_replace_devices()
_take_lists_of_sizes()

import megatron.core.tensor_parallel.random as rng  # noqa: E402
import megatron.core.transformer.moe.moe_utils as moe_utils  # noqa: E402

rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # without Transformer Engine 0.16.1 leaves the name undefined

import megatron.core.transformer.multi_latent_attention as latent  # noqa: E402

latent.HAVE_TE = False  # 0.16.1 thinks that its stand-ins for Transformer Engine are there
