"""Finds the compiled extension and says plainly what is used.

Nothing happens at import. The first op that runs loads `megatron_samoe/_C*.so`, if it is there and was built for the
running torch and from these sources; otherwise the slow twins of ops/reference.py do the work, and one line says so.
MEGATRON_SAMOE_EXTENSION=off never loads it, =require raises ExtensionError instead of falling back, =auto (the default)
falls back.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.errors import ConfigError, ExtensionError, nearest
from megatron_samoe.log import say_once

ENVIRONMENT_VARIABLE = "MEGATRON_SAMOE_EXTENSION"
_MODES = ("auto", "require", "off")
_BUILD_MARK = b"MEGATRON_SAMOE_BUILD_INFO="
_BUILD_AGAIN = "Rebuild it with `make install` (or `pip install --no-build-isolation -e .`)."
_HOW_TO_BUILD = "Build it with `pip install --no-build-isolation -e .` (it needs a C++ compiler: apt-get install g++)."


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which sums over tensors of a dtype are held: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _library_path() -> Path | None:
    """Returns the newest compiled library beside the package, or None."""
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _read_build_info(path: Path) -> dict[str, Any]:
    """Returns the record which the build left inside a library; reading it does not load the library."""
    content = path.read_bytes()
    start = content.find(_BUILD_MARK)
    if start < 0:
        raise ExtensionError(
            f"{path.name} holds no build record, so it is not a library of this project. {_HOW_TO_BUILD}"
        )
    start += len(_BUILD_MARK)
    info: dict[str, Any] = json.loads(content[start : content.index(b"\0", start)])
    return info


def _load_or_explain() -> str | None:
    """Loads the library. Returns None when it is in use, else a sentence that says why not."""
    path = _library_path()
    if path is None:
        return f"it is not built. {_HOW_TO_BUILD}"
    try:
        info = _read_build_info(path)
    except ExtensionError as error:
        return str(error)
    if info["torch"] != torch.__version__:
        return f"it was built for torch {info['torch']} and torch {torch.__version__} is running. {_BUILD_AGAIN}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}. {_HOW_TO_BUILD}"
    from megatron_samoe.ops import fake, schemas

    difference = schemas.difference()
    if difference:
        return f"it was built from older sources than this Python code ({difference}). {_BUILD_AGAIN}"
    fake.register()
    return None


@functools.cache
def load() -> bool:
    """Returns whether the compiled ops can be used, loading them at the first call.

    Errors: ExtensionError where the extension is required and not usable; ConfigError for an unknown mode.
    """
    mode = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if mode not in _MODES:
        raise ConfigError(ENVIRONMENT_VARIABLE, mode, f"one of {', '.join(_MODES)}.{nearest(mode, _MODES)}")
    if mode == "off":
        return False
    reason = _load_or_explain()
    if reason is None:
        return True
    message = f"The compiled extension is not used: {reason}"
    if mode == "require":
        raise ExtensionError(f"{message} ({ENVIRONMENT_VARIABLE}=require forbids the slower torch ops.)")
    say_once(f"{message} Slower torch ops do its work.")
    return False


def available() -> bool:
    """Returns whether load() finds a usable library; unlike load() it never raises ExtensionError."""
    try:
        return load()
    except ExtensionError:
        return False


def build_info() -> dict[str, Any]:
    """Returns what the build recorded (torch, compiler, flags, instruction sets) and what this CPU uses of it.

    Empty where there is no library of this project.
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
    return info


def serves(*tensors: torch.Tensor | None) -> bool:
    """Returns whether the compiled CPU ops take these tensors: on the CPU, and fp32 or bf16 where floating."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return False
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16):
            return False
    return load()
