"""What the CUDA kernels launch, read and write, counted without a GPU: each access of their own source, emulated."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.harness.compiled import ROOT, compile_all, compile_one
from tests.harness.emulated_cuda import FLAGS, KERNELS
from tools.benchmarks.gpu_budget import LAUNCHES

pytestmark = [
    pytest.mark.night,
    pytest.mark.skipif(not KERNELS or shutil.which("g++") is None, reason="needs g++ and the source tree"),
]

#: Bytes read and written, over those of operands and results read and written once. What is more than once is read from
#: caches: tokens by each of their two rows, banks by each tile of 8 (backward: 16) layers, a row of logits by each choice, counts
#: of slots by each later expert.
MOST = {
    "combine, 8 layers, 4 banks": (1.0, 1.0),
    "combine, 24 layers, 6 banks": (3.0, 1.0),
    "combine backward, 8 layers, 4 banks": (1.01, 1.01),
    "combine backward, 24 layers, 6 banks": (2.01, 2.01),
    "permute, fp32": (2.0, 1.0),
    "permute, bf16": (2.0, 1.0),
    "unpermute, fp32": (1.0, 1.0),
    "unpermute, bf16": (1.0, 1.0),
    "unpermute backward, fp32": (1.4, 1.0),
    "unpermute backward, bf16": (1.4, 1.0),
    "gate": (9.0, 6.5),
    "gate backward": (1.9, 1.1),
    "sort": (5.7, 1.8),
    "swiglu": (1.0, 1.0),
    "swiglu backward": (1.0, 1.0),
}


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


def test_operands_and_results_are_read_and_written_once(counts: dict[str, dict[str, Any]]) -> None:
    for what, (most_read, most_written) in MOST.items():
        row = counts[what]
        assert row["touched_written"] >= row["ideal_written"], f"{what}: a result was not counted"
        read, written = row["read"] / row["ideal_read"], row["written"] / row["ideal_written"]
        assert row["touched_read"] <= 1.4 * row["ideal_read"], f"{what}: reads what is no operand"
        assert read <= most_read and written <= most_written, f"{what}: read {read:.2f} times, written {written:.2f}"


def test_launches_are_those_of_the_budget(counts: dict[str, dict[str, Any]]) -> None:
    found = {what: row["launches"] for what, row in counts.items()}
    names = {name: name.replace(" ", "_") for name in ("swiglu", "swiglu backward")}
    names |= {f"{name}, bf16": name.replace(" ", "_") for name in ("permute", "unpermute", "unpermute backward")}
    names |= {"gate": "topk_gate", "gate backward": "topk_gate_backward", "sort": "make_permutation"}
    names["combine, 24 layers, 6 banks"] = "combine_banks"
    names["combine backward, 24 layers, 6 banks"] = "combine_banks_backward"
    assert {name: found[what] for what, name in names.items()} == LAUNCHES
