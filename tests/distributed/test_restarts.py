"""A fault that does not pass ends a job under torchrun at once, spare ranks stand by, and torchrun's store outside a job's hosts.

tests/hosts starts jobs again after ranks, agents and hosts were lost.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.harness.pairs import first_by_day
from tests.harness.program import REPOSITORY, arguments, start, start_command

pytestmark = pytest.mark.distributed

OPTIONS = {"train_iters": 250, "lr": 1e-4, "eval_iters": 0, "expert_model_parallel_size": 2}


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
    args = arguments(**{"data_path": corpus, **OPTIONS, **options})
    run = start_command(args, tmp_path / "out", 2, ["--standalone", "--max-restarts=3"])
    status = run.wait(60)
    output = run.output()
    assert status != (0,)
    assert "torchrun is asked not to try again" in output
    assert "gradient norm" in output if "lr" in options else problem in output
    assert len(re.findall(r"Starting worker group|attempts left", output)) == 0
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1, output


def test_ranks_that_the_layout_has_no_use_for_stand_by(corpus: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "train_iters": 6, "save_interval": 20, "keep_last": 2}
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", elastic=True, **options)
    output = start(args, tmp_path / "out", 3).succeed()
    assert "2 of 3 ranks work" in output and "1 stand by" in output
    assert "Traceback" not in output


def test_the_store_serves_and_says_why_it_cannot_start() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "tools/rendezvous_store.py", "--host", "127.0.0.1", "--port"]
    with subprocess.Popen([*command, str(port)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None and f"port {port}" in serving.stdout.readline()
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
            store.set("key", "value")
            assert store.get("key") == b"value"
            for taken, problem in ((0, "from 1 to 65535"), (port, "cannot be listened on")):
                done = subprocess.run(
                    [*command, str(taken)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
                )
                assert done.returncode != 0 and problem in done.stderr and "Traceback" not in done.stderr
        finally:
            serving.kill()
