"""Every published set-up in examples/configs can be planned, and reduced in width it trains."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.config.cli import from_mapping, read_yaml
from megatron_samoe.planning.layout_cost import Cluster
from megatron_samoe.planning.layout_planner import plan_layouts
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.teacher import load_teacher
from megatron_samoe.training.train_step import train_step
from tests.harness.pairs import first_by_day
from tests.harness.tiny import micro_batches, started, with_options

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples/configs").glob("*_*.yaml"))
STEPS = 20


def example(path: Path) -> PretrainConfig:
    return from_mapping(read_yaml(path), path.name)


def reduced(config: PretrainConfig) -> PretrainConfig:
    """Returns the model with its layers and its map, but 32 channels, a sixteenth of the experts, one process, one micro-batch."""
    moe = config.moe
    counts = tuple(max(count // 16, 2 * moe.moe_router_topk) for count in moe.expert_counts)
    if moe.sharing == "pool":
        counts = (2 * config.model.num_layers,)
    sizes = {"hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    steps = {"micro_batch_size": 2, "global_batch_size": 2, "train_iters": STEPS, "bf16": False}
    rate = {"lr_warmup_iters": 0, "lr_warmup_fraction": None, "lr": 2e-3}
    if moe.expert_layout != "dense":
        sizes |= {"num_experts": counts if len(counts) > 1 else counts[0], "moe_ffn_hidden_size": 16}
        steps["moe_per_layer_logging"] = False
    if moe.pool_lock_step is not None:
        steps |= {"pool_lock_step": 5, "pool_lock_anneal_steps": 10, "pool_lock_vote_steps": 3}
        sizes["pool_lock_entropy_group_size"] = 2
    return with_options(replace(config, parallel=ParallelConfig()), **sizes, **steps, **rate)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_can_be_planned(path: Path) -> None:
    cluster = Cluster(32, 8, 72e9, 989e12, 450e9, 50e9, 3350e9)
    config = with_options(example(path), teacher=None, teacher_until=None)
    assert plan_layouts(config, 50257, cluster, (1, 2, 4)), "it fits 32 GPUs of 72 GB"


@pytest.mark.parametrize("path", first_by_day([p for p in EXAMPLES if "dense" not in p.stem], 4), ids=lambda p: p.stem)
def test_an_example_trains_at_reduced_width(path: Path, tmp_path: Path) -> None:
    config = reduced(example(path))
    if config.distillation.teacher is not None:
        teacher = reduced(example(path.with_name(f"{Path(config.distillation.teacher).name}.yaml")))
        teacher = with_options(teacher, save=str(tmp_path / "teacher"))
        save_run(*started(teacher))
        config = with_options(config, teacher=str(tmp_path / "teacher"), teacher_until=STEPS // 2)
    setup, state = started(config)
    if config.distillation.teacher is not None:
        setup = replace(setup, teacher=load_teacher(config, setup.model))
    losses = []
    for _ in range(STEPS):
        result, state = train_step(setup, state, micro_batches(setup, 0))
        losses.append(result.lm_loss)
        assert (result.kl_loss is None) == (setup.teacher is None)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.2, "one batch is learned by heart"
