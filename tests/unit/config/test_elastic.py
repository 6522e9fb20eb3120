"""The layout that a run takes when the number of ranks changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.derived import data_parallel_size
from megatron_samoe.config.elastic import fit_layout
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.training import DistillationConfig, TrainingConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError
from tests.harness.tables import table

TABLE = table(__file__)


def config(
    moe: dict[str, Any] | None = None, micro_batch: int = 2, batch: int | None = 16, **parallel: Any
) -> PretrainConfig:
    base = PretrainConfig()
    return replace(
        base,
        model=replace(base.model, num_layers=8, hidden_size=64, num_attention_heads=8),
        moe=MoEConfig(expert_layout="samoe", num_experts=8, **(moe or {})),
        parallel=ParallelConfig(elastic=True, **parallel),
        training=TrainingConfig(micro_batch_size=micro_batch, global_batch_size=batch),
        data=DataConfig(mock_data=True),
    )


def sizes(fitted: PretrainConfig, used: int) -> tuple[int, ...]:
    split = (getattr(fitted.parallel, f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline", "expert"))
    return used, *split, data_parallel_size(fitted, used), fitted.training.micro_batch_size


@pytest.mark.parametrize(("options", "world", "expected"), TABLE["layouts"])
def test_data_parallelism_changes_first(options: dict[str, Any], world: int, expected: tuple[int, ...]) -> None:
    fitted, used = fit_layout(config(**options), world)
    assert sizes(fitted, used) == expected
    assert fitted.training.global_batch_size == 16
    validate(fitted, used)


@pytest.mark.parametrize("world", range(1, 40))
def test_every_number_of_ranks_has_a_layout(world: int) -> None:
    given = config(tensor_model_parallel_size=4, pipeline_model_parallel_size=2, expert_model_parallel_size=4)
    fitted, used = fit_layout(given, world)
    validate(fitted, used)
    assert world / 2 < used <= world or used == 32  # a batch of 16 cannot be split further


def test_a_layout_that_fits_stays_as_it_is() -> None:
    given = config(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True)
    assert fit_layout(given, 8) == (given, 8)


def test_micro_batches_keep_their_size_where_capacity_counts_their_tokens() -> None:
    assert fit_layout(config({"moe_expert_capacity_factor": 1.0}), 16)[1] == 8


def test_a_teacher_must_fit_the_layout_too() -> None:
    taught = replace(config(tensor_model_parallel_size=4), distillation=DistillationConfig(teacher="runs/teacher"))
    few_heads = replace(config(), model=replace(config().model, num_attention_heads=2))
    assert sizes(*fit_layout(taught, 8, config()))[:2] == (8, 4)
    assert sizes(*fit_layout(taught, 4, config()))[:2] == (4, 4)
    with pytest.raises(ConfigError, match=r"the teacher's --num-attention-heads = 2.*--tensor-model-parallel-size 4"):
        fit_layout(taught, 8, few_heads)


@pytest.mark.parametrize(("options", "field"), TABLE["refused"])
def test_what_no_number_of_ranks_makes_legal_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = "):
        fit_layout(config(**options), 4)
