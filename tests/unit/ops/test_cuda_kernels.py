"""The CUDA kernels without a GPU: their own source runs under g++, emulated, in any order, and is counted; nvcc compiles it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.compiled import ROOT, compile_all, compile_one
from tests.harness.emulated_cuda import FLAGS, KERNELS
from tests.harness.tables import table
from tools.benchmarks.gpu_budget import LAUNCHES

pytestmark = pytest.mark.skipif(not KERNELS, reason="needs the source tree")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
TABLE = table(__file__)
REGISTERS, THREADS = 65536, 2048


@pytest.mark.night
@pytest.mark.parametrize("order", ["descending", "shuffled"])
def test_results_do_not_depend_on_the_order_of_threads(order: str) -> None:
    """By day, blocks and threads between two exchanges have their turns in ascending order."""
    options = "-q -p no:cacheprovider -k emulated".split()
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent)]
    environment = {**os.environ, "SAMOE_EMULATED_ORDER": order}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:]


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
    for path in KERNELS:
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
    assert len(found) >= 2 * len(KERNELS)
    for symbol, registers in found:
        blocks = min(REGISTERS // (256 * -(-int(registers) // 8) * 8), THREADS // 256)
        least = TABLE["least occupancy"].get(kernel_name(symbol), 0.5)
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
    for name in TABLE["wide"]:
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


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("traffic")
    testing = ROOT / "cpp_ext" / "testing"
    counted = [(path, ["-fsanitize=thread", "-fno-threadsafe-statics", "-x", "c++"]) for path in KERNELS]
    plain = [(testing / name, []) for name in ("stand_ins/access_counts.cpp", "kernels/count_cuda_traffic.cpp")]
    jobs = [(path, own, str(folder / f"{path.name}.o")) for path, own in (*counted, *plain)]
    compile_all([["g++", *FLAGS, *own, "-c", str(path), "-o", o] for path, own, o in jobs])
    program = folder / "count"
    compile_one(["g++", *(o for *_, o in jobs), "-o", str(program)])
    said = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=True).stdout
    return {row["what"]: row for row in map(json.loads, said.splitlines())}


@pytest.mark.night
@needs_compiler
def test_operands_and_results_are_read_and_written_once(counts: dict[str, dict[str, Any]]) -> None:
    for what, (most_read, most_written) in TABLE["most"].items():
        row = counts[what]
        assert row["touched_written"] >= row["ideal_written"], f"{what}: a result was not counted"
        read, written = row["read"] / row["ideal_read"], row["written"] / row["ideal_written"]
        assert row["touched_read"] <= 1.4 * row["ideal_read"], f"{what}: reads what is no operand"
        assert read <= most_read and written <= most_written, f"{what}: read {read:.2f} times, written {written:.2f}"


@pytest.mark.night
@needs_compiler
def test_launches_are_those_of_the_budget(counts: dict[str, dict[str, Any]]) -> None:
    found = {what: row["launches"] for what, row in counts.items()}
    names = {name: name.replace(" ", "_") for name in ("swiglu", "swiglu backward")}
    names |= {f"{name}, bf16": name.replace(" ", "_") for name in ("permute", "unpermute", "unpermute backward")}
    names |= {"gate": "topk_gate", "gate backward": "topk_gate_backward", "sort": "make_permutation"}
    names["combine, 24 layers, 6 banks"] = "combine_banks"
    names["combine backward, 24 layers, 6 banks"] = "combine_banks_backward"
    assert {name: found[what] for what, name in names.items()} == LAUNCHES
