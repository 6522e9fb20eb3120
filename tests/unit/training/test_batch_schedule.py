"""Batches that grow, and runs that are as long as their samples, from where they begin: by hand, resumed, and over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.cli.pretrain import main
from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.derived import (
    batch_size_after,
    batch_sizes,
    samples_after,
    steps_for_samples,
    with_train_iters,
)
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.batches import build_run_data
from megatron_samoe.training.resume import Start
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.program import assert_same_checkpoint
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout, with_options

TINY = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --mock-data --eval-iters 0 --num-threads 1 "
    "--micro-batch-size 1"
).split()
RAMP = {"global_batch_size": 8, "micro_batch_size": 1, "train_samples": 60, "rampup_batch_size": (2, 2, 30)}


def ramped(**options: Any) -> PretrainConfig:
    return with_options(tiny_config("samoe", **RAMP), **options)


def steps(config: PretrainConfig) -> Iterator[tuple[int, int]]:
    """Yields samples before each step, and its size."""
    consumed = 0
    for _ in range(steps_for_samples(config, 1) or 0):
        size = batch_size_after(config, 1, consumed)
        yield consumed, size
        consumed += size


def test_a_batch_grows_in_equal_parts_of_the_samples() -> None:
    # Three increments of 2 from 2 to 8, each over 10 samples; a size changes at the step that follows.
    assert [size for _, size in steps(ramped())] == [2] * 5 + [4] * 3 + [6] * 2 + [8] * 3
    assert batch_sizes(ramped(), 1) == (2, 4, 6, 8)
    assert with_train_iters(ramped(), 1).training.train_iters == 10, "which was given, and so stays"
    assert with_train_iters(ramped(train_iters=100), 1).training.train_iters == 13
    assert samples_after(ramped(), 1, 0, 13) == 58 and samples_after(ramped(), 1, 22, 4) == 50


def test_without_a_ramp_samples_are_whole_batches() -> None:
    config = ramped(rampup_batch_size=None)
    assert steps_for_samples(config, 1) == 60 // 8
    assert {size for _, size in steps(config)} == {8}


def test_a_run_that_goes_on_with_other_batches_trains_for_as_many_samples() -> None:
    config = ramped(rampup_batch_size=None, train_iters=100, global_batch_size=10)
    # Five steps of 4 sequences, then four of 10; without a model's size there is none.
    assert with_train_iters(config, 1, (5, 20)).training.train_iters == 5 + 4
    assert with_train_iters(config, 1, (15, 60)).training.train_iters == 15
    in_ramp = with_train_iters(ramped(train_iters=100), 1, (11, 22)).training.train_iters
    assert in_ramp == 11 + 5, "two of 6 and three of 8, as from the start"
    assert steps_for_samples(with_layout(config, tp=0), 1) is None


def train_all(config: PretrainConfig) -> list[tuple[float, float, int]]:
    """Returns loss, rate and size of every step."""
    parallel = initialize_model_parallel(config.parallel)
    setup = build_setup(config, ByteTokenizer().vocab_size, parallel)
    state, found = initial_state(setup), []
    batches = build_run_data(config, ByteTokenizer(), parallel).train_batches(0)
    for _ in range(config.training.train_iters):
        result, state = train_step(setup, state, next(batches))
        found.append((result.lm_loss, result.learning_rate, result.batch_size))
    assert state.consumed_samples == sum(size for *_, size in found) == 58
    return found


def test_growing_batches_train_on_ranks_as_in_one_process() -> None:
    config = ramped(mock_data=True, train_iters=13, lr_warmup_samples=12)
    alone = run_ranks(train_all, 1, config)[0]
    for layout in ({"zero": True}, {"pp": 2, "vpp": 1}):
        spread = with_layout(config, **layout)
        if "zero" not in layout:
            spread = with_options(spread, pool_replica_check_interval=None)
        found = torch.tensor(run_ranks(train_all, 2, spread)[0])
        torch.testing.assert_close(found, torch.tensor(alone), rtol=1e-5, atol=0)


def test_a_run_that_stops_while_its_batch_grows_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    flags = [*TINY, "--global-batch-size", "8", "--train-samples", "60", "--rampup-batch-size", "2", "2", "30"]
    flags += ["--lr-warmup-samples", "12"]
    assert main([*flags, "--run-dir", str(tmp_path / "whole")]) == 0
    assert main([*flags, "--run-dir", str(tmp_path / "parts"), "--exit-interval", "7"]) == 0
    assert (tmp_path / "parts/checkpoints/iter_0000007").is_dir()
    assert main([*flags, "--run-dir", str(tmp_path / "parts")]) == 0
    folders = [tmp_path / run / "checkpoints/iter_0000013" for run in ("parts", "whole")]
    assert_same_checkpoint(*folders)


def test_a_run_goes_on_for_its_samples_with_batches_of_another_size(tmp_path: Path) -> None:
    flags = [*TINY, "--train-samples", "40", "--run-dir", str(tmp_path)]
    assert main([*flags, "--global-batch-size", "4", "--exit-interval", "5"]) == 0
    assert main([*flags, "--global-batch-size", "8"]) == 0
    assert (tmp_path / "checkpoints/iter_0000007").is_dir(), "two steps of 8 are whole batches of the 20 samples left"


def test_steps_of_samples_count_from_where_the_run_begins() -> None:
    asked = with_options(PretrainConfig(), train_samples=40, global_batch_size=4, pretrained_checkpoint="a", load="b")
    fresh = Start(asked.checkpoint).settle(asked, 1)
    assert fresh == with_options(asked, train_iters=10)
    # Batches of another size have made 5 steps of 20 samples before.
    assert Start(asked.checkpoint, 5, 20).settle(asked, 1).training.train_iters == 5 + 5


def test_what_a_first_start_loads_is_told_by_its_beginning() -> None:
    asked = with_options(PretrainConfig(), pretrained_checkpoint="a", load="b")
    first = replace(asked.checkpoint, load="a", finetune=True)
    assert Start(first).settle(asked, 1) == replace(asked, checkpoint=first)
