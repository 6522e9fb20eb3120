"""Studies that run: in parts, beside others, held, stopped, killed and gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_samoe.cli.report import main as report_main
from megatron_samoe.cli.study import main
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.evaluation.study.definition import read_study
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.runner import StudyRunner
from tests.unit.evaluation.test_study import STUDY, TABLE, write_atomically, write_study


def program(study: Path, *words: str) -> list[str]:
    """Returns the command line of a study in a process of its own."""
    code = "import sys; from megatron_samoe.cli.study import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, str(study), "--full-priority", *words]


def wait_for_records(process: subprocess.Popen, folder: Path) -> None:
    """Waits until a run of a study has written its first record."""
    metrics = folder / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (metrics.is_file() and metrics.stat().st_size):
            break
        time.sleep(0.1)


def test_a_study_runs_goes_on_and_refuses_other_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, runs = tmp_path / "runs", {"one pool": STUDY["runs"]["one pool"]}
    study = write_study(tmp_path, runs=runs, baseline="one pool")
    command = [str(study), "--output-dir", str(out), "--seeds", "3", "--full-priority"]
    assert main(command) == 0, capfd.readouterr()
    results = json.loads((out / "results.json").read_text())
    by_name = {v["name"]: v for v in results["variants"]}
    assert list(by_name) == ["one pool", "one pool, one bank"]
    assert by_name["one pool"]["difference"] is None
    # Two banks for two layers, each begun on its own bank: the coefficients are frozen at one bank, so nothing changes.
    assert by_name["one pool, one bank"]["losses"] == by_name["one pool"]["losses"]
    assert by_name["one pool, one bank"]["tokens_per_s"] is None
    metrics = [json.loads(line) for line in (out / "one-pool/seed-3/metrics.jsonl").read_text().splitlines()]
    assert by_name["one pool"]["losses"] == [metrics[-1]["validation_loss"]]
    difference = by_name["one pool, one bank"]["difference"]
    assert (difference["mean"], difference["half_width"]) == (0, None)

    capfd.readouterr()
    with (out / "one-pool/seed-3/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "lm_l')  # as a kill leaves it
    assert main(command) == 0
    assert capfd.readouterr().out.count("finished before") == 2
    assert main([*command, "--lr", "0.02"]) != 0
    assert "--lr 0.01 (now 0.02)" in capfd.readouterr().err
    assert main([*command, "--learn-rate", "1"]) == 2
    assert "--learn-rate is not known" in capfd.readouterr().err


@pytest.mark.night
def test_a_run_that_fails_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = {"load": str(tmp_path / "none"), "exit-on-missing-checkpoint": True}
    runs = {"broken": {"expert-layout": "samoe", **missing}, "whole": {}}
    study = write_study(
        tmp_path, runs=runs, derived={"folded": {"from": "broken", "edit": "fold"}}, seeds=[1], baseline=None
    )
    assert main([str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]) == 1
    said = capfd.readouterr()
    assert "whole, seed 1: validation loss" in said.out
    assert "broken, seed 1: A run ended with status" in said.err and "none" in said.err
    assert "folded, seed 1: broken, seed 1 is not finished" in said.err
    assert "No seed is finished for every model" in said.err


@pytest.mark.night
def test_a_signal_to_the_study_ends_its_run_with_a_checkpoint(tmp_path: Path) -> None:
    study = write_study(tmp_path, runs={"only": {"train-iters": 10**6}}, derived=None, baseline=None)
    folder = tmp_path / "runs/only/seed-1"
    command = program(study, "--output-dir", str(tmp_path / "runs"))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_records(process, folder)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command resumes" in error
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").is_file(), (folder / "log.txt").read_text()


@pytest.mark.night
def test_sweeps_lengths_and_a_store_make_one_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lengths = {"10": {}, "5": {"train-iters": 5, "lr-wsd-decay-iters": 2}}
    study, store = write_atomically(tmp_path, sizes=lengths), tmp_path / "store"
    command = [str(study), "--store", str(store), "--full-priority", "--jobs", "2"]
    assert main([*command, "--output-dir", str(tmp_path / "a")]) == 0, capfd.readouterr()
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert [v["name"] for v in results["variants"]] == ["own", "pool", "one bank"]
    assert [[(v["name"], v["steps"]) for v in other["variants"]] for other in results["others"]] == [
        [("own", 5), ("pool", 5), ("one bank", None)]
    ]
    assert [o["variant"] for o in results["optima"]] == ["pool", "pool"], "the other's rate is fixed"
    found = results["optima"][0]["value"]
    flags = next(c for c in results["commands"] if "a/10/pool/seed-1" in c)
    assert f"--lr {found:.6g}" in flags

    assert report_main(["--study", str(tmp_path / "a/results.json"), "--output", str(tmp_path / "report.html")]) == 0
    for plot in ("differences", "lengths"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")

    # The store holds all of it: elsewhere nothing is trained again, and the results are the same.
    capfd.readouterr()
    assert main([*command, "--output-dir", str(tmp_path / "b")]) == 0
    said = capfd.readouterr().out
    assert ": validation loss" not in said and said.count("found in the store") >= 7
    again = json.loads((tmp_path / "b/results.json").read_text())
    assert [v["losses"] for v in again["variants"]] == [v["losses"] for v in results["variants"]]
    assert not list((tmp_path / "b").rglob("checkpoints"))


@pytest.mark.night
def test_a_gate_stops_a_study_whose_regime_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = {"own": {"expert-layout": "moe"}, "pool": {"expert-layout": "samoe"}, "never": {"expert-layout": "moe"}}
    gates = [{"arm": "pool", "baseline": "own", "at-most": -9}]
    study = write_atomically(tmp_path, sweep=None, derived=None, seeds=[1], runs=runs, gates=gates)
    assert main([str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]) == 1
    said = capfd.readouterr()
    assert "stops at a gate: pool - own is" in said.err and "at most -9" in said.err
    assert not (tmp_path / "runs/never/seed-1/run.json").exists()


@pytest.mark.night
def test_a_study_killed_at_random_points_comes_to_the_same_results(tmp_path: Path) -> None:
    runs = {"pool": {"expert-layout": "samoe", "num-expert-banks": 2}}
    study = write_atomically(tmp_path, sweep=None, gates=None, runs=runs, baseline="pool")
    command = program(study, "--jobs", "2", "--save-interval", "1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, "--output-dir", str(whole)], check=True, capture_output=True)
    draw = random.Random(0)
    silent = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    for number in range(20):
        with subprocess.Popen([*command, "--output-dir", str(broken)], **silent) as process:
            time.sleep(draw.uniform(2, 12))
            process.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3])
            process.wait(timeout=60)
    subprocess.run([*command, "--output-dir", str(broken)], check=True, capture_output=True)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, broken))
    for found in (first, second):
        for comparison in (found, *found["others"]):
            for variant in comparison["variants"]:
                for measured in ("directories", "tokens_per_s", "peak_memory_bytes"):
                    del variant[measured]
        del found["commands"]
    assert first == second


@pytest.mark.night
def test_a_study_that_is_held_holds_its_run_until_it_may_go_on(tmp_path: Path) -> None:
    """Ctrl-Z reaches the study alone, whose runs have sessions of their own."""
    study = write_study(tmp_path, runs={"only": {"train-iters": 400}}, derived=None, baseline=None, seeds=[1])
    metrics = tmp_path / "runs/only/seed-1/metrics.jsonl"
    command = program(study, "--output-dir", str(tmp_path / "runs"))
    with subprocess.Popen(command) as process:
        wait_for_records(process, metrics.parent)
        try:
            process.send_signal(signal.SIGTSTP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            held = metrics.stat().st_size
            time.sleep(2)
            assert metrics.stat().st_size == held and process.poll() is None
        finally:  # the end of the block waits for the process, however it is left
            process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=240) == 0
    assert metrics.stat().st_size > held


def test_what_another_program_makes_is_left_to_it(tmp_path: Path) -> None:
    """A run's folder is its claim."""
    runner = StudyRunner(StudyPlan(read_study(write_study(tmp_path, derived=None)), tmp_path / "runs", ()))
    started: list[Path] = []
    runner._started = lambda run, command: started.append(run.directory)  # type: ignore
    first, *others = [run.directory for run in runner.plan.all_runs()]
    first.mkdir(parents=True)
    with folder_lock(first):
        while runner._start_next():
            pass
    assert started == others
    for making in list(runner.active.values()):
        runner._close(making)


def test_a_part_is_some_runs_and_all_that_they_need(tmp_path: Path) -> None:
    study = read_study(write_atomically(tmp_path, seeds=[1, 2], gates=None))
    plan = StudyPlan(study, tmp_path / "runs", ())
    runs = {plan.name_of(run): run for run in plan.all_runs()}
    swept = [name for name, run in runs.items() if run.swept is not None]
    assert swept == ["pool/lr-0.001/seed-1", "pool/lr-0.004/seed-1", "pool/lr-0.016/seed-1"]
    needed = [plan.name_of(run) for run in plan.chosen(["one-bank/seed-2"])]
    assert needed == [*swept, "pool/seed-2", "one-bank/seed-2"]
    assert [plan.name_of(run) for run in plan.chosen(["own/seed-1"])] == ["own/seed-1"]
    assert plan.chosen(None) == plan.all_runs()


@pytest.mark.parametrize(("words", "said"), TABLE["wrong parts"])
def test_a_wrong_part_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert main([str(write_study(tmp_path)), "--output-dir", str(tmp_path / "runs"), *words.split()]) == 2
    assert said in capfd.readouterr().err


def test_a_study_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path)
    assert main([str(study.with_name("studies.yaml")), "--output-dir", str(tmp_path / "runs")]) == 2
    assert "no such file. Did you mean 'study.yaml'?" in capfd.readouterr().err


def test_parts_are_all_runs_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [str(write_study(tmp_path)), "--output-dir", str(tmp_path / "runs"), "--dry-run"]
    shown = []
    for part in ([], ["--shard", "1/3"], ["--shard", "2/3"], ["--shard", "3/3"]):
        assert main([*command, *part]) == 0
        shown.append([line.split()[2] for line in capfd.readouterr().out.splitlines()])
    whole, first, second, third = shown
    assert len(whole) == 6 and set(whole) == {*first, *second, *third}
    assert first == ["own-experts/seed-1", "own-experts/seed-2"] and second == ["one-pool/seed-1", "one-pool/seed-2"]
    assert third == [name for name in whole if "pool" in name], "what is edited is made first"
