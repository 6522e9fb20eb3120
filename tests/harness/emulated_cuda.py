"""The CUDA ops without a GPU: their bindings and kernels as a library for CPU tensors, the kernels emulated.

It is made by g++ from the sources of a CUDA build (cpp_ext/bindings/*/*_cuda.cpp, cpp_ext/kernels/cuda/*.cu) and registers
the ops under a namespace of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron_samoe.ops import schemas
from tests.harness.compiled import ROOT, compile_all, compile_one

KERNELS = sorted((ROOT / "cpp_ext" / "kernels" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "cpp_ext" / "bindings").rglob("*_cuda.cpp"))
NAMESPACE = "megatron_samoe_emulated"
TRAINING_OPS = tuple(
    (
        "topk_gate topk_gate_backward make_permutation permute unpermute unpermute_backward combine_banks "
        "combine_banks_backward swiglu swiglu_backward"
    ).split()
)
DECODE_OPS = tuple(
    (
        "decode_linear decode_norm decode_attention_block decode_experts decode_route decode_moe_block combine_rows"
    ).split()
)
_WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
# Fortified libraries refuse jumps between the stacks of the emulation's fibers.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-math-errno", "-U_FORTIFY_SOURCE", *_WARNINGS]


def build_library(folder: Path) -> Path:
    """Compiles the library into a folder and returns its path."""
    torch_folder = Path(torch.__file__).parent
    torch_flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        *_WARNINGS,
        f"-isystem{torch_folder / 'include'}",
    ]
    major, minor = re.findall(r"^OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "cpp_ext/builder.py").read_text(), re.M)[0]
    torch_flags += [f"-DTORCH_TARGET_VERSION={int(major) << 56 | int(minor) << 48}"]
    torch_flags += ["-DSAMOE_CUDA_KEY=CPU", f"-DSAMOE_CUDA_NAMESPACE={NAMESPACE}"]
    jobs = [(path, torch_flags) for path in BINDINGS] + [(path, [*FLAGS, "-x", "c++"]) for path in KERNELS]
    objects = [str(folder / f"{path.name}.o") for path, _ in jobs]
    compile_all([["g++", *flags, "-c", str(path), "-o", o] for (path, flags), o in zip(jobs, objects, strict=True)])
    library = folder / "emulated.so"
    link = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl", "-Wl,--no-undefined"]
    compile_one(["g++", *objects, *link, "-o", str(library)])
    return library


def load_library(library: Path) -> torch.library.Library:
    """Defines the ops under their namespace, as the package's table has them, and loads the library that fills them."""
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name in (*TRAINING_OPS, *DECODE_OPS):
        definitions.define(schemas.SCHEMAS[name])
    torch.ops.load_library(str(library))
    return definitions
