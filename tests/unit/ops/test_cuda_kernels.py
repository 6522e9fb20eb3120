"""The CUDA kernels without a GPU: their own source runs under g++, emulated, against the CPU kernels; nvcc compiles it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.compiled import ROOT, compile_all
from tests.harness.emulated_cuda import FLAGS
from tests.harness.emulated_cuda import KERNELS as SOURCES

CHECKS = ("check_cuda_kernels", "check_cuda_decode")
pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the source tree")


@pytest.mark.night
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_emulated_kernels_agree_with_the_cpu_kernels(tmp_path: Path) -> None:
    cpu = sorted((ROOT / "cpp_ext" / "kernels" / "cpu" / "simd").glob("*.cpp"))
    plain = [ROOT / "cpp_ext" / name for name in ("kernels/cpu/dispatch.cpp", "kernels/cpu/counting_sort.cpp")]
    plain += [ROOT / "cpp_ext" / "testing" / "kernels" / f"{name}.cpp" for name in CHECKS]
    jobs = [(path, ["-DSAMOE_ISA=portable"]) for path in cpu] + [(path, ["-x", "c++"]) for path in SOURCES]
    jobs += [(path, []) for path in plain]
    objects = [str(tmp_path / f"{i}.o") for i in range(len(jobs))]
    compile_all([["g++", *FLAGS, *own, "-c", str(path), "-o", o] for (path, own), o in zip(jobs, objects, strict=True)])
    shared, mains = objects[: -len(CHECKS)], objects[-len(CHECKS) :]
    programs = [str(tmp_path / name) for name in CHECKS]
    compile_all([["g++", *shared, main, "-o", program] for main, program in zip(mains, programs, strict=True)])
    for program, order in itertools.product(programs, ("ascending", "descending", "shuffled")):
        environment = {**os.environ, "SAMOE_EMULATED_ORDER": order}
        result = subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 0, f"{program}, {order}: {result.stderr}"
        assert "agree with the CPU's" in result.stdout


#: Least share of a multiprocessor's 2,048 threads that a kernel's registers leave room for; others: half. The gate keeps
#: few bytes moving, and the combination and its backward have several wide loads on their way in each thread.
LEAST_OCCUPANCY = {
    "combine_backward_kernel": 0.125,
    **dict.fromkeys(("attend", "product_kernel"), 0.25),
    **dict.fromkeys(("combine_kernel", "gate_runs"), 0.375),
}
#: Kernels whose variant for aligned rows reads 16 bytes at a time, and writes as many.
WIDE = [
    f"{name}_kernel"
    for name in ("combine", "gather_rows", "unpermute", "unpermute_backward", "swiglu", "swiglu_backward")
]
REGISTERS, THREADS = 65536, 2048


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """What ptxas said of all kernels, for both GPUs, and the binaries for sm_90."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("nvcc")
    targets = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    reports = ["-Xptxas", "-v,-warn-spills,-Werror"]
    flags = ["-std=c++17", "-O3", "-lineinfo", *targets, "-Xcompiler", "-Wall,-Wextra", *reports, "-keep"]
    commands = []
    for path in SOURCES:
        own = folder / path.stem
        own.mkdir()
        commands.append(["nvcc", *flags, "-keep-dir", str(own), "-c", str(path), "-o", str(own / f"{path.stem}.o")])
    return "".join(compile_all(commands)), sorted(folder.glob("*/*.sm_90.cubin"))


def kernel_name(symbol: str) -> str:
    """Returns the innermost of a symbol's names, which each follow their length."""
    rest, name = symbol.removeprefix("_ZN"), ""
    while length := re.match(r"\d+", rest):
        start, end = length.end(), length.end() + int(length[0])
        name, rest = rest[start:end], rest[end:]
    return name


@pytest.mark.night
def test_nvcc_compiles_every_kernel_without_spills(compiled: tuple[str, list[Path]]) -> None:
    found = re.findall(r"Compiling entry function '(\S+)' for 'sm_\d+'.*?Used (\d+) registers", compiled[0], re.S)
    assert len(found) >= 2 * len(SOURCES)
    for symbol, registers in found:
        blocks = min(REGISTERS // (256 * -(-int(registers) // 8) * 8), THREADS // 256)
        least = LEAST_OCCUPANCY.get(kernel_name(symbol), 0.5)
        assert blocks * 256 / THREADS >= least, f"{symbol}: {registers} registers"


@pytest.mark.night
def test_aligned_rows_are_read_16_bytes_at_a_time(compiled: tuple[str, list[Path]]) -> None:
    """In the device's own code, as NVIDIA's disassembler shows it."""
    disassembler = next(iter(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm")), None)
    if disassembler is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    for binary in compiled[1]:
        code = subprocess.run([disassembler, str(binary)], capture_output=True, text=True, check=True).stdout
        for section in re.split(r"^\.text\.(?=_Z)", code, flags=re.M)[1:]:
            name = kernel_name(section.split(":")[0])
            loads[name] += len(re.findall(r"\bLDG\.E\.128", section))
            stores[name] += len(re.findall(r"\bSTG\.E\.128", section))
    for name in WIDE:
        assert loads[name] and stores[name], f"{name}: {loads[name]} wide loads, {stores[name]} wide stores"


@pytest.mark.parametrize("experts", [1, 70])
def test_a_sort_of_more_chunks_than_a_warp_has_lanes(library: Any, experts: int) -> None:
    ids = torch.randint(-1, experts, (5001, 2), generator=torch.Generator().manual_seed(experts))
    slots, _, counts, ends = library.make_permutation(ids, experts)
    flat = ids.flatten()
    kept = flat >= 0
    order = torch.argsort(torch.where(kept, flat, experts), stable=True)
    assert torch.equal(slots[: int(kept.sum())], order[: int(kept.sum())])
    assert torch.equal(counts, torch.bincount(flat[kept], minlength=experts))
    assert torch.equal(ends[:-1].long(), counts.cumsum(0)[:-1]) and ends[-1] == flat.numel()
