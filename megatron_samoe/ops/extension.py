"""The search for the compiled extension, and what of it this process uses.

Nothing happens at import. The first op that runs loads `megatron_samoe/_C*.so`, if it is there, takes the running torch
and was built from these sources. It uses only torch's stable ABI, so it takes every torch from `oldest_torch` of its
record on. Otherwise the reference implementations of ops/reference.py do the work, and one line says so.
MEGATRON_SAMOE_EXTENSION=off never loads it, =require raises ExtensionError instead of falling back, and =auto (the
default) falls back.

A CUDA tensor goes to a CUDA kernel that this process trusts. MEGATRON_SAMOE_CUDA_KERNELS=auto (the default) trusts those of
training that `runtime.kernels` has compared with their references at the start of a run; =1 all, unseen; =0 none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megatron_samoe.errors import ConfigError, ExtensionError, nearest
from megatron_samoe.installation import how_to_build
from megatron_samoe.log import say_once
from megatron_samoe.ops.asynchronous import runs_behind_host
from megatron_samoe.ops.process_choice import ProcessChoice

ENVIRONMENT_VARIABLE = "MEGATRON_SAMOE_EXTENSION"
_MODES = ("auto", "require", "off")
CUDA_ENVIRONMENT_VARIABLE = "MEGATRON_SAMOE_CUDA_KERNELS"
_CUDA_MODES = ("auto", "0", "1")
#: CUDA kernels by what they do; the last, of inference, nobody compares at the start, so only =1 takes it.
CudaKernel = Literal["gate", "rows", "combination", "swiglu", "decoding"]
TRAINING_KERNELS: tuple[CudaKernel, ...] = get_args(CudaKernel)[:-1]
_BUILD_MARK = b"MEGATRON_SAMOE_BUILD_INFO="


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over tensors of a dtype: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _library_path() -> Path | None:
    """Returns the newest compiled library in the package's folder, or None."""
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _read_build_info(path: Path) -> dict[str, Any]:
    """Returns the record that the build left inside a library, without loading it."""
    content = path.read_bytes()
    start = content.find(_BUILD_MARK)
    if start < 0:
        raise ExtensionError(
            f"{path.name} holds no build record, so it is not a library of this project. {how_to_build()}"
        )
    start += len(_BUILD_MARK)
    info: dict[str, Any] = json.loads(content[start : content.index(b"\0", start)])
    return info


def torch_release(version: str) -> tuple[int, int]:
    """Returns the major and minor number of a version such as 2.13.0+cpu."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _load_or_explain() -> torch.library.Library | str:
    """Loads the library and returns the ops that it implements, or returns a sentence that says why not."""
    path = _library_path()
    if path is None:
        return f"it is not built. {how_to_build()}"
    try:
        info = _read_build_info(path)
    except ExtensionError as error:
        return str(error)
    if torch_release(torch.__version__) < torch_release(info["oldest_torch"]):
        return f"it takes torch {info['oldest_torch']} and later, and torch {torch.__version__} is running."
    from megatron_samoe.ops import cpu_products, fake, schemas

    if info.get("schemas") != schemas.digest():
        return f"it was built from other sources than this Python code. {how_to_build()}"
    ops = schemas.define()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}. {how_to_build()}"
    fake.register()
    cpu_products.use()
    return ops


def _setting(variable: str, allowed: tuple[str, ...]) -> str:
    """Returns an environment variable's value, the first allowed one by default; ConfigError where it is not allowed."""
    value = os.environ.get(variable, allowed[0])
    if value not in allowed:
        raise ConfigError(variable, value, f"one of {', '.join(allowed)}.{nearest(value, allowed)}")
    return value


@functools.cache  # the ops last as long as this value
def load() -> torch.library.Library | None:
    """Returns the compiled ops, loaded at the first call, or None where they cannot be used.

    Raises:
        ExtensionError: the extension is required and not usable.
        ConfigError: the mode is unknown.
    """
    mode = _setting(ENVIRONMENT_VARIABLE, _MODES)
    _setting(CUDA_ENVIRONMENT_VARIABLE, _CUDA_MODES)  # a bad value is refused wherever the run is
    if mode == "off":
        return None
    loaded = _load_or_explain()
    if not isinstance(loaded, str):
        return loaded
    message = f"The compiled extension is not used: {loaded}"
    if mode == "require":
        raise ExtensionError(f"{message} ({ENVIRONMENT_VARIABLE}=require forbids the slower torch ops.)")
    say_once(f"{message} Slower torch ops do its work.")
    return None


def available() -> bool:
    """Returns whether load() finds a usable library; unlike load() it never raises ExtensionError."""
    try:
        return load() is not None
    except ExtensionError:
        return False


def has_cuda_kernels() -> bool:
    """Returns whether the loaded library was built with the CUDA kernels."""
    return load() is not None and torch._C._dispatch_has_kernel_for_dispatch_key("megatron_samoe::topk_gate", "CUDA")


_trusted: ProcessChoice[frozenset[CudaKernel]] = ProcessChoice(frozenset())


def trust(kernels: Iterable[CudaKernel]) -> None:
    """From here on CUDA tensors go to these CUDA kernels, unless the environment variable says otherwise."""
    _trusted.value = frozenset(kernels)


def trusting(kernels: Iterable[CudaKernel]) -> contextlib.AbstractContextManager[None]:
    """Inside, these are trusted, and no others."""
    return _trusted.replaced_by(frozenset(kernels))


def cuda_kernels_are_chosen() -> bool:
    """Returns whether a run chooses its CUDA kernels by comparing them with their references."""
    return _asked_for() is None


def uses_cuda_kernel(kernel: CudaKernel) -> bool:
    """Returns whether CUDA tensors go to a CUDA kernel: it was built, and it is trusted or asked for.

    Raises:
        ExtensionError, ConfigError: as load().
    """
    asked = _asked_for()
    return kernel in (_trusted.value if asked is None else asked)


@functools.cache
def _asked_for() -> frozenset[CudaKernel] | None:
    """Returns the CUDA kernels that the environment variable asks for, or None where a run chooses."""
    mode = _setting(CUDA_ENVIRONMENT_VARIABLE, _CUDA_MODES)
    if mode == "auto":
        return None
    if mode == "1" and not has_cuda_kernels():
        say_once(
            f"{CUDA_ENVIRONMENT_VARIABLE}=1 has no effect: the compiled extension has no CUDA kernels or is not in use. "
            "Build it with MEGATRON_SAMOE_BUILD=cuda."
        )
        return frozenset()
    return frozenset(get_args(CudaKernel) if mode == "1" else ())


def cuda_kernels_in_use() -> list[CudaKernel]:
    """Returns the CUDA kernels that CUDA tensors go to."""
    return [kernel for kernel in get_args(CudaKernel) if uses_cuda_kernel(kernel)]


def build_info() -> dict[str, Any]:
    """Returns what the build recorded (torch, compiler, instruction sets, CUDA) and what this process uses of it.

    Empty without a library of this project.
    """
    path = _library_path()
    if path is None:
        return {}
    try:
        info = _read_build_info(path)
    except ExtensionError:
        return {}
    info["library"] = path.name
    if available():
        info["instruction_set"] = torch.ops.megatron_samoe.instruction_set()
        info["cuda_kernels_in_use"] = cuda_kernels_in_use()
    return info


def build_identity() -> dict[str, str]:
    """Returns the facts that must be equal in builds that work together: their sources, and whether they have CUDA kernels."""
    info = build_info()
    kernels = f"with kernels for CUDA {info['cuda']}" if info.get("cuda") else "without CUDA kernels"
    return {"a compiled extension": f"from sources {info.get('sources', 'unknown')[:12]} {kernels}"}


def serves(*tensors: torch.Tensor | None, cuda: CudaKernel | None = None) -> bool:
    """Returns whether a compiled op takes these tensors: all on one device, and fp32 or bf16 where they are floating.

    Args:
        cuda: the op's CUDA kernel, if it has one; else the device must be the CPU.
    """
    device = None
    for tensor in tensors:
        if tensor is None:
            continue
        device = tensor.device if device is None else device
        if tensor.device != device:
            return False
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16):
            return False
    if device is not None and runs_behind_host(device):
        return cuda is not None and uses_cuda_kernel(cuda)
    return (device is None or device.type == "cpu") and load() is not None
