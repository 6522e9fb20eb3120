"""The CUDA kernels without a GPU: their own source runs under g++, emulated, against the CPU kernels; nvcc compiles it."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "cpp_ext" / "kernels" / "cuda").glob("*.cu"))
pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the source tree")


def compile_all(commands: list[list[str]]) -> None:
    def run(command: list[str]) -> None:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, commands))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_emulated_kernels_agree_with_the_cpu_kernels(tmp_path: Path) -> None:
    compiler = ["ccache", "g++"] if shutil.which("ccache") else ["g++"]
    flags = [
        "-std=c++17",
        "-O1",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
    ]
    cpu = sorted((ROOT / "cpp_ext" / "kernels" / "cpu" / "simd").glob("*.cpp"))
    plain = [ROOT / "cpp_ext" / name for name in ("kernels/cpu/dispatch.cpp", "kernels/cpu/counting_sort.cpp")]
    plain.append(ROOT / "cpp_ext" / "testing" / "check_cuda_kernels.cpp")
    jobs = [(path, ["-DSAMOE_ISA=portable"]) for path in cpu] + [(path, ["-x", "c++"]) for path in SOURCES]
    jobs += [(path, []) for path in plain]
    objects = [str(tmp_path / f"{i}.o") for i in range(len(jobs))]
    compile_all(
        [[*compiler, *flags, *own, "-c", str(path), "-o", o] for (path, own), o in zip(jobs, objects, strict=True)]
    )
    program = tmp_path / "check"
    compile_all([["g++", *objects, "-o", str(program)]])
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "agree with the CPU's" in result.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_nvcc_compiles_every_kernel(tmp_path: Path) -> None:
    targets = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    flags = ["-std=c++17", "-O3", "-lineinfo", *targets, "-Xcompiler", "-Wall,-Wextra"]
    commands = [["nvcc", *flags, "-c", str(path), "-o", str(tmp_path / f"{path.stem}.o")] for path in SOURCES]
    compile_all(commands)
