"""The comparison of CUDA kernels with their twins at the start of a run, in a process that may die."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.ops import combine, extension
from megatron_samoe.ops.extension import TRAINING_KERNELS
from megatron_samoe.runtime import kernels
from tests.harness.extension_off import without_extension

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


@needs_library
def test_kernels_that_agree_are_found_by_the_process() -> None:
    """The CPU's ops stand for a GPU's."""
    assert kernels.compare(kernels.comparison_of(torch.device("cpu"))) == dict.fromkeys(TRAINING_KERNELS, "")


def test_a_kernel_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = combine.combine_chunks.combine

    def wrong(a: Any, t: Any, out: Any) -> None:
        whole(a, t, out)
        out[..., -1:] += 1e-3

    monkeypatch.setattr(combine.combine_chunks, "combine", wrong)
    without_extension(monkeypatch)
    assert kernels.main(["cpu", "combination", "swiglu"]) == 0
    verdicts = dict(map(json.loads, capsys.readouterr().out.splitlines()))
    assert verdicts["combination"].startswith("it differs from its reference") and verdicts["swiglu"] == ""


def test_an_error_of_the_device_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def illegal(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setitem(kernels._CHECKS, "gate", illegal)
    assert kernels.main(["cpu", "gate", "rows"]) == 1
    assert json.loads(capsys.readouterr().out) == ["gate", "CUDA error: an illegal memory access was encountered"]


SCRIPT = """
import json, os, sys, time
for kernel in sys.argv[2:]:
    if kernel == "rows":
        print("a library's greeting", flush=True)
        os.abort()
    if kernel == "gate":
        time.sleep(60)
    if kernel == "swiglu":
        raise SystemExit("no device is left")
    print(json.dumps([kernel, "it differs" if kernel == "combination" else ""]), flush=True)
"""


def test_a_process_that_dies_or_hangs_costs_one_kernel(tmp_path: Path) -> None:
    script = tmp_path / "compare.py"
    script.write_text(SCRIPT)
    assert kernels.compare([sys.executable, str(script), "cuda:0"], timeout_s=2.0) == {
        "gate": "it was not done after 2 s",
        "rows": "its process ended with status -6",
        "combination": "it differs",
        "swiglu": "no device is left",
    }
    missing = kernels.compare([str(tmp_path / "python")])
    assert set(missing) == set(TRAINING_KERNELS) and "cannot be started" in missing["gate"]


def verdicts(**problems: str) -> Any:
    return {kernel: problems.get(kernel, "") for kernel in TRAINING_KERNELS}


def test_hosts_use_what_agrees_on_all_and_a_run_keeps_what_it_used() -> None:
    every, line = kernels.agreement([verdicts(), verdicts()], None)
    assert every == list(TRAINING_KERNELS) and line.endswith("combination, swiglu agree with their references")
    found, line = kernels.agreement([verdicts(), verdicts(rows="it differs")], None)
    assert found == [k for k in every if k != "rows"] and "torch does the work of rows: it differs" in line
    found, line = kernels.agreement([verdicts(gate="it differs")], ["gate", "rows"])
    assert found == ["rows"] and "torch does the work of combination, swiglu, as in this run so far" in line
    found, line = kernels.agreement([verdicts(**dict.fromkeys(TRAINING_KERNELS, kernels._NOT_BUILT))], None)
    assert not found and line.startswith("CUDA kernels: none; the extension was built without them")


def test_a_cpu_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_samoe.parallel_state import single_process_state

    monkeypatch.setattr(kernels, "compare", lambda *a: pytest.fail("compared"))
    kernels.choose_kernels(single_process_state(), None)
