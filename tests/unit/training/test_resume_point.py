"""The final configuration of a run follows from what was asked for and from where the run begins."""

from __future__ import annotations

from dataclasses import replace

from megatron_samoe.config import PretrainConfig
from megatron_samoe.training.resume import Start
from tests.harness.tiny import with_options


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
