"""A rank that dies or hangs in a step ends the others in time, with a reason; bad layouts are refused before any exchange."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.cli.pretrain import main
from megatron_samoe.config import PretrainConfig
from megatron_samoe.errors import CommunicationError
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.parallel_state.backend import is_communication_failure
from megatron_samoe.training.setup import build_setup
from megatron_samoe.training.trainer import Trainer
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, RandomBatches, tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed

TABLE = table(__file__)

TIMEOUT_S = 3.0
HANG_S = 7.0
#: Time for a loaded machine to notice, beyond the wait that is configured.
SLACK_S = 6.0


class Trouble:
    """Strikes before a forward pass, counted from 1 over all steps."""

    def __init__(self, kind: str, at_pass: int):
        self.kind, self.at_pass, self.passes = kind, at_pass, 0
        self.began = 0.0

    def __call__(self, *_: Any) -> None:
        self.passes += 1
        if self.passes != self.at_pass:
            return
        self.began = time.monotonic()
        if self.kind == "exit":
            os._exit(7)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(HANG_S)


def train_with_trouble(config: PretrainConfig, kind: str, victim: int, at_pass: int) -> dict[str, Any]:
    """Trains until trouble strikes the victim; returns what this rank's trainer raised, and when."""
    parallel = initialize_model_parallel(config.parallel)
    setup = build_setup(config, VOCAB_SIZE, parallel)
    trouble = Trouble(kind, at_pass)
    if parallel.rank == victim:
        setup.model.chunks[0].register_forward_pre_hook(trouble)
    started = time.monotonic()
    try:
        Trainer(setup, RandomBatches(setup), []).run()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - started}
    return {"error": None, "message": "", "seconds": time.monotonic() - started}


def troubled(layout: str, world: dict[str, Any]) -> PretrainConfig:
    return with_options(
        with_layout(tiny_config(layout), **world),
        distributed_timeout_minutes=TIMEOUT_S / 60,
        train_iters=3,
        eval_iters=0,
    )


@pytest.mark.parametrize("case", first_by_day(TABLE["troubles"], 3))
def test_the_others_end_in_time_and_say_why(case: str) -> None:
    layout, world_size, sizes, kind, victim, at_pass = TABLE["troubles"][case]
    config = troubled(layout, sizes)
    results = run_ranks(train_with_trouble, world_size, config, kind, victim, at_pass, may_die=True)
    if kind != "hang":
        assert results[victim] == (7 if kind == "exit" else -signal.SIGKILL)
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        assert result["error"] == CommunicationError.__name__, result
        assert f"ank {rank}" in result["message"], "which rank speaks"
        assert result["seconds"] < TIMEOUT_S + SLACK_S, result
    neighbours = [r["message"] for rank, r in enumerate(results) if rank != victim and "Pipeline stage" in r["message"]]
    if "pp" in sizes:
        said = r"waited \d s and never got the" if kind == "hang" else "lost its connection while it waited for the"
        assert all(re.search(said, message) for message in neighbours), neighbours
        stage, what = rf"Pipeline stage \d of {sizes['pp']} \(rank \d\)", r"\w+ of micro-batch \d for virtual stage \d"
        sentence = re.compile(rf"{stage} {said} {what} (from|to) rank {victim}: ")
        assert any(map(sentence.search, neighbours)), neighbours
    else:
        assert all("while computing iteration" in r["message"] for i, r in enumerate(results) if i != victim)


@pytest.mark.parametrize("case", TABLE["bad layouts"])
def test_a_bad_layout_is_refused_by_a_rank_that_is_alone(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other seven ranks do not exist: whoever waited for them would never answer."""
    words, field, nearest = TABLE["bad layouts"][case]
    for name, value in {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    status = main(["--mock-data", "--micro-batch-size", "1", *words])
    message = capsys.readouterr().err
    assert status == 2 and field in message, message
    assert all(part in message for part in nearest), message


LIMIT = timedelta(milliseconds=500)


def operations(group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """Returns what a layout asks of gloo, each as a call that waits."""
    numbers, many = torch.ones(4), torch.ones(1 << 20)
    return {
        "all_reduce": lambda: dist.all_reduce(numbers, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(4), numbers, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(2), numbers, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(8), numbers, group=group),
        "send": lambda: dist.send(many, 1, group=group),
        "isend": lambda: dist.isend(many, 1, group=group).wait(),  # type: ignore[union-attr]
        "recv": lambda: dist.recv(numbers, 1, group=group),
        "objects": lambda: dist.all_gather_object([None, None], 1, group=group),
        "barrier": lambda: dist.barrier(group=group),
    }


def without_a_peer(first: str, fate: str) -> list[tuple[str, bool, str]]:
    """Returns what operations, `first` before all, raise on rank 0, and whether it is known; rank 1 meets its fate."""
    group = dist.new_group([0, 1], timeout=LIMIT)
    if dist.get_rank() == 1:
        dist.barrier()
        if fate == "stopped":
            time.sleep(3)
        os._exit(7)
    pending = dist.irecv(torch.ones(4), 1, group=group)  # as a pipeline stage has one under way
    dist.barrier()
    calls = operations(group)
    said = []
    for name in (first, *calls, "pending"):
        try:
            pending.wait() if name == "pending" else calls[name]()  # type: ignore[union-attr]
        except RuntimeError as error:
            said.append((name, is_communication_failure(error), str(error)))
    return said


@pytest.mark.parametrize(("first", "fate"), [("all_reduce", "stopped"), ("send", "stopped"), ("all_to_all", "lost")])
def test_what_waiting_ranks_hear_is_known(first: str, fate: str) -> None:
    said, left = run_ranks(without_a_peer, 2, first, fate, may_die=True)
    assert left == 7 and len(said) == 11, said
    assert all(known for _, known, _ in said), [message for _, known, message in said if not known]
    if fate == "stopped":
        assert any(message == "Application timeout caused pair closure" for *_, message in said), said
