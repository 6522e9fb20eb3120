"""Hooks see every point of a run on every rank; checkpoints name parts from outside, and others refuse them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import CheckpointConfig, PretrainConfig
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.errors import CheckpointError
from megatron_samoe.models.blueprint import ModelParts
from megatron_samoe.moe.types import MoEStats, StatisticsLayout
from megatron_samoe.ops.topk_gate import described
from megatron_samoe.parallel_state import initialize_model_parallel, single_process_state
from megatron_samoe.runtime.load import load_model
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.hooks.loggers import ConsoleLog
from megatron_samoe.training.setup import Extensions, build_setup
from megatron_samoe.training.train_step import StepResult
from megatron_samoe.training.trainer import Trainer
from tests.extending.even_scores import EvenScores
from tests.extending.expert_choice import ExpertChoiceRouter
from tests.extending.sliding_window import SlidingWindowAttention
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, RandomBatches, tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed
TABLE = table(__file__, tuples=False)


def noted(point: str) -> Callable[..., None]:
    """Returns a method that writes down where a run is."""

    def note(witness: Witness, run: Training, *_: object) -> None:
        witness.seen.append((point, run.state.iteration))

    return note


class Witness(Hook):
    """Writes down what it is told, and what it can see then."""

    start, pre_step, backward_done = noted("start"), noted("pre_step"), noted("backward_done")
    post_step, checkpoint_saved, close = noted("post_step"), noted("checkpoint_saved"), noted("close")

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.records: list[Record] = []

    def wants_gradients(self, run: Training) -> bool:
        return run.state.iteration == 1

    def pre_optim_step(self, run: Training, grad_norm: float) -> None:
        # A collective: every rank is here at the same time.
        assert run.setup.parallel.world.all_gather_object(grad_norm) == [grad_norm] * run.setup.parallel.world_size
        self.seen.append(("pre_optim_step", run.state.iteration))

    def wants_record(self, run: Training) -> bool:
        return run.state.iteration == 1

    def contribute(self, run: Training, result: StepResult, record: Record) -> None:
        record["witness"] = run.setup.parallel.rank

    def record(self, run: Training, record: Record) -> None:
        self.records.append(record)


class FirstRank(Witness):
    rank_0_only = True


def watched(config: PretrainConfig) -> dict[str, Any]:
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    everywhere, first = Witness(), FirstRank()
    Trainer(setup, RandomBatches(setup), [everywhere]).run()  # type: ignore[arg-type]
    other = replace(config, checkpoint=CheckpointConfig())
    setup = build_setup(other, VOCAB_SIZE, setup.parallel)
    # A hook of rank 0 alone must not communicate.
    first.pre_optim_step = lambda run, grad_norm: None  # type: ignore[method-assign,assignment]
    Trainer(setup, RandomBatches(setup), [first]).run()  # type: ignore[arg-type]
    return {"rank": dist.get_rank(), "seen": everywhere.seen, "records": everywhere.records, "first": len(first.seen)}


def test_hooks_are_called_at_every_point_on_every_rank(tmp_path: Path) -> None:
    config = with_layout(tiny_config("samoe"), pp=2)
    config = with_options(config, train_iters=2, eval_iters=0, save=str(tmp_path / "c"), load=str(tmp_path / "c"))
    steps = [("pre_step", 0), ("pre_optim_step", 0), ("post_step", 1)]
    steps += [("pre_step", 1), ("backward_done", 1), ("pre_optim_step", 1), ("post_step", 2)]
    for result in run_ranks(watched, 2, config):
        seen = [event for event in result["seen"] if event[0] != "checkpoint_saved"]
        assert seen == [("start", 0), *steps, ("close", 2)], result["rank"]
        assert [r["iteration"] for r in result["records"]] == [1, 2], "wanted, and the last"
        assert all(r["witness"] == result["rank"] for r in result["records"])
        assert (result["first"] > 0) == (result["rank"] == 0)
        if result["rank"] == 0:
            assert ("checkpoint_saved", 2) in result["seen"]


class Gradients(Hook):
    """Keeps what it sees of main gradients: before any is reduced, and when all are."""

    def wants_gradients(self, run: Training) -> bool:
        return True

    def backward_done(self, run: Training) -> None:
        self.own = {name: p.main_grad.clone() for name, p in run.setup.buffers.parameters.items()}

    def pre_optim_step(self, run: Training, grad_norm: float) -> None:
        self.reduced = {name: p.main_grad.clone() for name, p in run.setup.buffers.parameters.items()}


def gradients(config: PretrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    setup, hook = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel)), Gradients()
    Trainer(setup, RandomBatches(setup), [hook]).run()  # type: ignore[arg-type]
    return hook.own, hook.reduced


def test_a_hook_sees_gradients_before_they_travel() -> None:
    """Also where they would set off while the backward pass goes on."""
    config = with_layout(tiny_config("dense", num_layers=1, train_iters=1), overlap=True, bucket=2000)
    (first, reduced), (second, _) = run_ranks(gradients, 2, config)
    for name, summed in reduced.items():
        torch.testing.assert_close(first[name] + second[name], summed, rtol=1e-5, atol=1e-7, msg=name)


def train_to(config: PretrainConfig, train_iters: int, parts: ModelParts | None = None, *hooks: Hook) -> None:
    config = with_options(config, train_iters=train_iters)
    setup = build_setup(config, VOCAB_SIZE, single_process_state(), extensions=Extensions(parts or ModelParts()))
    Trainer(setup, RandomBatches(setup), hooks).run()  # type: ignore[arg-type]


def test_a_checkpoint_of_foreign_parts_is_for_the_program_that_has_them(tmp_path: Path) -> None:
    config = tiny_config("moe", moe_router_load_balancing_type="none", eval_iters=0, mock_data=True)
    config = with_options(config, save=str(tmp_path / "c"), load=str(tmp_path / "c"))
    parts = ModelParts(router=ExpertChoiceRouter)
    train_to(config, 1, parts)
    train_to(config, 2, parts)
    for other in (None, ModelParts(attention=SlidingWindowAttention)):
        with pytest.raises(CheckpointError, match=r"parts from outside the package are .*ExpertChoiceRouter"):
            train_to(config, 3, other)
    with pytest.raises(
        CheckpointError,
        match=r"parts from outside megatron_samoe \(router tests\.extending\.expert_choice\.ExpertChoiceRouter\)",
    ):
        load_model(open_folder(tmp_path / "c"), single_process_state())


def test_a_balance_strategy_from_outside_keeps_nobody_from_running_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("moe", eval_iters=0, mock_data=True)
    config = with_options(config, save=str(tmp_path / "c"), load=str(tmp_path / "c"))
    said: list[str] = []
    monkeypatch.setattr("megatron_samoe.training.hooks.loggers.logger.info", said.append)
    train_to(config, 1, ModelParts(balance=EvenScores), ConsoleLog(1))
    (line,) = (text for text in said if "lm loss" in text)
    assert "least load entropy" in line and "load balancing loss" not in line
    with pytest.raises(CheckpointError, match=r"parts from outside the package are .*EvenScores"):
        train_to(config, 2, None)
    assert load_model(open_folder(tmp_path / "c"), single_process_state()).config.moe.num_experts == 4


def test_parts_and_hooks_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a class derived from Router"):
        ModelParts(router=lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attention is None; it must be a class or a function"):
        ModelParts(attention=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attention is a lambda"):
        ModelParts(attention=lambda *arguments: SlidingWindowAttention(*arguments))
    setup = build_setup(tiny_config("moe"), VOCAB_SIZE, single_process_state())
    with pytest.raises(TypeError, match="is not a Hook"):
        Trainer(setup, RandomBatches(setup), [Witness])  # type: ignore[arg-type,list-item]
    with pytest.raises(TypeError, match=r"pre_optimizer_step is not one of a hook's points .* is it pre_optim_step"):
        type("Mistyped", (Hook,), {"pre_optimizer_step": lambda self, run: None})


def test_parts_with_other_arguments_have_other_names() -> None:
    names = [
        ModelParts(attention=partial(SlidingWindowAttention, **o)).replaced()["attention"] for o in ({}, {"window": 3})
    ]
    assert names[0].endswith("SlidingWindowAttention()") and names[1].endswith("SlidingWindowAttention(window=3)")


class Counting(SlidingWindowAttention):
    """Counts its calls in a buffer."""

    persistent = True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register_buffer("calls", torch.zeros(1), persistent=self.persistent)


class CountingAnew(Counting):
    persistent = False


def test_state_that_checkpoints_would_forget_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layers.0.attention.calls.* would not be in checkpoints"):
        build_setup(tiny_config("moe"), VOCAB_SIZE, single_process_state(), extensions=Extensions(ModelParts(Counting)))
    build_setup(tiny_config("moe"), VOCAB_SIZE, single_process_state(), extensions=Extensions(ModelParts(CountingAnew)))


@pytest.mark.parametrize(("ids", "probs", "problem"), TABLE["choices"])
def test_choices_that_do_not_fit_are_named(ids: list, probs: list, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        described(torch.zeros(2, 4), torch.tensor(ids), torch.tensor(probs), 1)


@pytest.mark.parametrize(("sums", "problem"), TABLE["statistics"])
def test_statistics_that_were_not_declared_are_named(sums: dict[str, int], problem: str) -> None:
    layout = StatisticsLayout({"counts": 4, "mine": 1})
    told = MoEStats(0, {name: torch.ones(size) for name, size in sums.items()})
    with pytest.raises(ValueError, match=problem):
        layout.add(layout.zeros(1, torch.device("cpu")), told)
