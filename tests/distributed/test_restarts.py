"""A job under torchrun survives its ranks, agents and hosts, and goes on as if nothing had been."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.pairs import first_by_day
from tests.harness.program import REPOSITORY, ProgramRun, arguments, records, start, start_command, write_corpus

pytestmark = pytest.mark.distributed

STEPS = 250
OPTIONS = {"train_iters": STEPS, "lr_decay_iters": STEPS, "lr": 1e-4, "eval_iters": 0}
OPTIONS |= {"save_interval": 20, "keep_last": 2, "expert_model_parallel_size": 2}
#: A dead agent is noticed after eight seconds: on a busy machine a living one may be late by some. Others are waited for briefly.
QUICK = "last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=4"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("restarts") / "data" / "corpus", num_documents=400)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    args = arguments(data_path=corpus, run_dir=folder / "run", **{**OPTIONS, "expert_model_parallel_size": 1})
    start(args, folder).succeed()
    return losses(folder / "run")


def losses(run: Path, steps: int = STEPS) -> list[float]:
    logged = records(run / "metrics.jsonl")
    assert [r["iteration"] for r in logged] == list(range(1, steps + 1))
    return [r["lm_loss"] for r in logged]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_step(run: ProgramRun, step: int, *others: ProgramRun) -> None:
    """Waits until some rank 0 has logged a step."""
    runs = (run, *others)
    assert run.wait_until(lambda: any(f"iteration {step:8d}/" in r.output() for r in runs)), [r.output() for r in runs]


def steps_of_two(run: ProgramRun) -> int:
    """Returns how many steps a rank 0 has logged since it began to work with another rank."""
    _, _, since = run.output().partition("2 of 2 ranks")
    return since.count("lm loss: ")


@pytest.mark.night  # by day tests/hosts starts ranks again where a host lost its power
@pytest.mark.parametrize("kills", [[(25, 0)], [(25, 0), (120, 1)]], ids=["once", "twice"])
def test_ranks_are_started_again(
    kills: list[tuple[int, int]], corpus: Path, tmp_path: Path, undisturbed: list[float]
) -> None:
    """All of a torchrun's attempts share a store, with the addresses of dead ranks in it."""
    steps = kills[-1][0] + 75  # which last until the kill
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", **{**OPTIONS, "train_iters": steps})
    run = start_command(args, tmp_path / "out", 2, ["--standalone", "--max-restarts=3"])
    for step, victim in kills:
        wait_for_step(run, step)
        psutil.Process(run.processes[0].pid).children()[victim].kill()
    output = run.succeed(90)
    assert len(re.findall(r"^loaded ", output, re.MULTILINE)) == len(kills)
    assert losses(tmp_path / "run", steps) == pytest.approx(undisturbed[:steps], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    first_by_day(
        [
            ({"num_experts": 3}, "--num-experts"),
            ({"lr": 1e30}, "is not told"),
            ({"data_path": "/nowhere/corpus"}, "/nowhere"),
        ]
    ),
)
def test_a_fault_that_does_not_pass_is_not_tried_again(
    options: dict[str, object], problem: str, corpus: Path, tmp_path: Path
) -> None:
    args = arguments(**{"data_path": corpus, **OPTIONS, "save_interval": None, "keep_last": None, **options})
    run = start_command(args, tmp_path / "out", 2, ["--standalone", "--max-restarts=3"])
    status = run.wait(60)
    output = run.output()
    assert status != (0,)
    assert "torchrun is asked not to try again" in output
    assert "gradient norm" in output if "lr" in options else problem in output
    assert len(re.findall(r"Starting worker group|attempts left", output)) == 0
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output


@pytest.fixture
def outside_store() -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "tools/rendezvous_store.py", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and f"port {port}" in process.stdout.readline()
    yield port
    process.kill()
    process.wait()


@pytest.mark.night  # tests/hosts loses a host by day
def test_a_job_goes_on_with_the_hosts_that_are_left(
    corpus: Path, tmp_path: Path, undisturbed: list[float], outside_store: int
) -> None:
    """Begins with one host, takes a second one, and loses the first, whose rank 0 held the ranks' own store."""
    args = arguments(
        data_path=corpus, run_dir=tmp_path / "run", elastic=True, distributed_timeout_minutes=0.5, **OPTIONS
    )
    agents: list[ProgramRun] = []

    def another_host() -> ProgramRun:
        """Starts an agent of one rank; all meet at the store."""
        options = (
            f"--nnodes=1:4 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{outside_store} --rdzv-id=job "
            f"--rdzv-conf={QUICK},is_host=0 --local-addr=127.0.0.1"
        ).split()
        shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        agents.append(start_command(args, tmp_path / "out", 1, options, **shared))
        return agents[-1]

    try:
        first = another_host()
        wait_for_step(first, 8)
        second = another_host()
        assert second.wait_until(lambda: any(steps_of_two(a) > 4 for a in agents)), second.output()
        first.processes[0].kill()
        second.succeed(120)
    finally:
        for agent in agents:
            agent.processes[0].kill()
    assert losses(tmp_path / "run") == pytest.approx(undisturbed, rel=1e-5)
    said = first.output() + second.output()
    assert "1 of 1 ranks work as tensor 1, pipeline 1, expert 1, data 1" in said
    assert "2 of 2 ranks work as tensor 1, pipeline 1, expert 2, data 2" in said


def test_ranks_that_the_layout_has_no_use_for_stand_by(corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", elastic=True, **{**OPTIONS, "train_iters": 6})
    output = start(args, tmp_path / "out", 3).succeed()
    assert "2 of 3 ranks work" in output and "1 stand by" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("problem", ["from 1 to 65535", "cannot be listened on"])
def test_the_store_says_why_it_cannot_start(problem: str) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1] if "listened" in problem else 0
        command = [sys.executable, "tools/rendezvous_store.py", "--port", str(port)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and problem in done.stderr and "Traceback" not in done.stderr
