"""`benchmark gpu-check` on a CPU: a dry run, what is finished, and what fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_samoe import children
from megatron_samoe.gpu_check import command
from megatron_samoe.gpu_check.check import measure, write_report
from megatron_samoe.gpu_check.command import main
from megatron_samoe.gpu_check.pieces import PIECES, Row, Task

DRY = ["gpu-check", "--device", "cpu", "--size", "tiny"]


def results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.night
def test_a_dry_run_leaves_a_report_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = [*DRY, "--output-dir", str(tmp_path), "--pieces", "machine", "waits", "ops-torch", "steps-torch", "profile"]
    assert main(flags) == 0
    found = results(tmp_path)
    others = [name for name in found if found[name]["state"] != "ok"]
    assert len(found) == 5 and others == ["waits"] and found["waits"]["state"] == "not here"
    assert [row["what"] for row in found["steps-torch"]["rows"]] == ["step, dense", "step, moe", "step, samoe"]
    assert all(row["tokens/s"] > 0 for row in found["steps-torch"]["rows"])
    shares = [row["share of a copy's speed"] for row in found["ops-torch"]["rows"] if "predicted" in row]
    assert len(shares) == 6 and all(0 < share < 2 for share in shares)
    shares = [row["share"] for row in found["profile"]["rows"]]
    assert 0.5 < sum(shares) <= 1.01 and shares == sorted(shares, reverse=True)
    report = (tmp_path / "report.md").read_text()
    assert "## waits: not here" in report and "step, samoe" in report
    capsys.readouterr()
    assert main(flags) == 0
    assert capsys.readouterr().out.count("finished before") == 5


def test_a_piece_that_fails_says_why_and_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def piece(task: Task) -> Iterator[Row]:
        yield {"what": "half", "measured": 1}
        raise ValueError("the other half is missing")

    monkeypatch.setitem(PIECES, "waits", (piece, 10))
    measure("waits", tmp_path / "waits.json", "cpu", "tiny")
    found = results(tmp_path)["waits"]
    assert (found["state"], found["why"]) == ("failed", "ValueError: the other half is missing")
    assert found["rows"] == [{"what": "half", "measured": 1}]
    assert write_report(tmp_path) == 1 and "## waits: failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("deed", "state", "why"),
    [("writes", "ok", ""), ("ends", "failed", "said, and complained"), ("hangs", "failed", "it took more than 180 s")],
)
def test_a_piece_has_a_result_however_its_process_ends(
    deed: str, state: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(words: Sequence[str], timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        if deed == "hangs":
            raise subprocess.TimeoutExpired(words, timeout)
        if deed == "writes":
            Path(words[-3]).write_text('{"state": "ok", "why": "", "rows": [{"a": 1}]}')
        return subprocess.CompletedProcess(words, 0, "said,", " and complained")

    monkeypatch.setattr(children, "run", run)
    assert main([*DRY, "--output-dir", str(tmp_path), "--pieces", "machine"]) == (state == "failed")
    rows = [{"a": 1}] if state == "ok" else []
    assert results(tmp_path) == {"machine": {"state": state, "why": why, "rows": rows}}


def test_a_machine_without_a_gpu_is_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu-check", "--output-dir", str(tmp_path)]) != 0
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_without_the_repository_other_benchmarks_say_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "checkout", lambda: None)  # as a wheel finds
    with pytest.raises(SystemExit) as ended:
        main(["moe-layer"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "(tools/benchmarks)" in told and told.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "gpu-check" in capsys.readouterr().out
