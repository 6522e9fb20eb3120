"""A decoding step allocates nothing: counted in the C library, below torch and numpy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_samoe.ops import extension
from tests.harness.pairs import first_by_day

HERE = Path(__file__).resolve().parent
#: Steps of four requests of a model whose rows are longer than what counts: any intermediate tensor would show.
PROGRAM = """
import ctypes, sys
import torch
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from tests.unit.inference.tiny_models import loaded_tiny

torch.set_num_threads(1)
counter = ctypes.CDLL(sys.argv[1])
loaded = loaded_tiny("samoe", hidden_size=256, moe_router_topk=2, moe_shared_expert_intermediate_size=256, style=sys.argv[3])
engine = Engine(loaded, max_batch=4, serving=sys.argv[2], dtype=sys.argv[4])
options = SamplingOptions(40, temperature=0.0, ignore_eod=True)
for i in range(4):
    engine.submit(Request([i + 1, 2, 3], options))
for _ in range(5):
    engine.step()
counter.start_counting()
for _ in range(10):
    assert len(engine.step()) == 4
print("steps", counter.stop_counting())
counter.start_counting()
torch.empty(4, 256)
print("tensor", counter.stop_counting())
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or sys.platform != "linux" or not extension.available():
        pytest.skip("needs a C++ compiler, glibc and the compiled extension")
    library = tmp_path_factory.mktemp("counter") / "count.so"
    source = str(HERE / "count_allocations.cpp")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    return library


@pytest.mark.parametrize(
    ("serving", "style", "dtype"),
    first_by_day([("on-the-fly", "llama", "bf16"), ("folded", "llama", "fp32"), ("folded", "gpt3", "int8")]),
)
def test_a_decoding_step_allocates_nothing(counter: Path, serving: str, style: str, dtype: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(counter), serving, style, dtype]
    environment = {**os.environ, "LD_PRELOAD": str(counter), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2], timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["steps", "0", "tensor", "1"]
