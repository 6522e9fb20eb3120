"""The CUDA kernels without a GPU: their own source runs under g++, emulated, against the CPU kernels; nvcc compiles it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.emulated_cuda import FLAGS, ROOT, compiler, run_all
from tests.harness.emulated_cuda import KERNELS as SOURCES

CHECKS = ("check_cuda_kernels", "check_cuda_decode")
pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the source tree")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_emulated_kernels_agree_with_the_cpu_kernels(tmp_path: Path) -> None:
    cpu = sorted((ROOT / "cpp_ext" / "kernels" / "cpu" / "simd").glob("*.cpp"))
    plain = [ROOT / "cpp_ext" / name for name in ("kernels/cpu/dispatch.cpp", "kernels/cpu/counting_sort.cpp")]
    plain += [ROOT / "cpp_ext" / "testing" / "kernels" / f"{name}.cpp" for name in CHECKS]
    jobs = [(path, ["-DSAMOE_ISA=portable"]) for path in cpu] + [(path, ["-x", "c++"]) for path in SOURCES]
    jobs += [(path, []) for path in plain]
    objects = [str(tmp_path / f"{i}.o") for i in range(len(jobs))]
    run_all(
        [[*compiler(), *FLAGS, *own, "-c", str(path), "-o", o] for (path, own), o in zip(jobs, objects, strict=True)]
    )
    shared, mains = objects[: -len(CHECKS)], objects[-len(CHECKS) :]
    programs = [str(tmp_path / name) for name in CHECKS]
    run_all([["g++", *shared, main, "-o", program] for main, program in zip(mains, programs, strict=True)])
    for program, order in itertools.product(programs, ("ascending", "descending", "shuffled")):
        environment = {**os.environ, "SAMOE_EMULATED_ORDER": order}
        result = subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 0, f"{program}, {order}: {result.stderr}"
        assert "agree with the CPU's" in result.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_nvcc_compiles_every_kernel(tmp_path: Path) -> None:
    targets = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    spills = ["-Xptxas", "-warn-spills,-Werror"]
    flags = ["-std=c++17", "-O3", "-lineinfo", *targets, "-Xcompiler", "-Wall,-Wextra", *spills]
    commands = [["nvcc", *flags, "-c", str(path), "-o", str(tmp_path / f"{path.stem}.o")] for path in SOURCES]
    run_all(commands)
