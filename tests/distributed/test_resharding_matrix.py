"""Saved under one layout, loaded under any other: the same state to the last bit, the same training.

A sample of pairs by day; at night all ordered pairs of 13 layouts for every model and precision (936 loads). -s shows the
largest difference of losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.checkpointing import find_run, load_run, model_state, optimizer_state, save_run
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import train_step
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout

pytestmark = pytest.mark.distributed
TABLE = table(__file__)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = TABLE["layouts"]
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layout": "dense", "style": "llama", "hidden_dropout": 0.1},
    "moe": {"layout": "moe", "style": "llama", "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 16},
    "samoe": {"layout": "samoe", "moe_input_jitter_eps": 0.05, "num_expert_banks": 3, "samoe_init": "uniform"},
}
#: Further ways of sharing and of routing; the lock of the pool falls between saving and the end.
WAYS: dict[str, dict[str, Any]] = TABLE["ways"]
STEPS_BEFORE, STEPS_AFTER = 2, 3
#: Relative difference of losses: sums over ranks are rounded in other orders, in bf16 after 8 bits.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
MOMENTS = ("optimizer.exp_avg", "optimizer.momentum")


def configuration(model: str, precision: str, layout: str, folder: Path) -> PretrainConfig:
    config = tiny_config(**{**MODELS, **WAYS}[model], bf16=precision == "bf16", save=str(folder), load=str(folder))
    return with_layout(config, **LAYOUTS[layout][1])


def sharded_run(setup: TrainSetup) -> dict[str, list[ShardedTensor]]:
    return {**model_state(setup.model), **optimizer_state(setup)}


def train(setup: TrainSetup, state: TrainState, steps: int) -> tuple[list[float], TrainState]:
    losses = []
    for _ in range(steps):
        result, state = train_step(setup, state, micro_batches(setup, state.iteration))
        losses.append(result.lm_loss)
    return losses, state


def begin(config: PretrainConfig) -> dict[str, Any]:
    """Trains, saves, and trains on: the run that was not interrupted."""
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    _, state = train(setup, initial_state(setup), STEPS_BEFORE)
    save_run(setup, state)
    saved = gather_global(sharded_run(setup), setup.parallel)
    losses, state = train(setup, state, STEPS_AFTER)
    return {"saved": saved, "losses": losses, "plain": state.plain()}


def go_on_from_each(configs: list[PretrainConfig]) -> list[dict[str, Any]]:
    """Loads one checkpoint after the other on the same processes and trains on."""
    results = []
    for config in configs:
        setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
        found = find_run(setup)
        assert found is not None
        with torch.no_grad():
            for parts in sharded_run(setup).values():
                for part in parts:
                    part.local.fill_(float("nan"))
        state = load_run(setup, initial_state(setup), found)
        loaded = gather_global(sharded_run(setup), setup.parallel)
        losses, state = train(setup, state, STEPS_AFTER)
        results.append({"saved": loaded, "losses": losses, "plain": state.plain()})
    return results if setup.parallel.rank == 0 else []


def matrix(
    model: str, precision: str, saves: list[str], loads: list[str], folder: Path, is_exact: bool = False
) -> None:
    firsts = {}
    for layout in saves:
        config = configuration(model, precision, layout, folder / layout)
        firsts[layout] = run_ranks(begin, LAYOUTS[layout][0], config)[0]
    worst_loss = 0.0
    for layout in loads:
        others = [saved_by for saved_by in saves if (saved_by == layout) == is_exact]
        configs = [configuration(model, precision, layout, folder / saved_by) for saved_by in others]
        results = run_ranks(go_on_from_each, LAYOUTS[layout][0], configs, timeout_s=600)[0]
        for saved_by, result in zip(others, results, strict=True):
            first, what = firsts[saved_by], f"{model} {precision}: saved by {saved_by!r}, loaded by {layout!r}"
            assert result["saved"].keys() == first["saved"].keys(), what
            assert not is_exact or result["losses"] == first["losses"], what
            assert sum(name.startswith(MOMENTS) for name in result["saved"]) > 40, what
            for name, tensor in first["saved"].items():
                assert torch.equal(result["saved"][name], tensor), f"{what}: {name}"
            pairs = zip(result["losses"], first["losses"], strict=True)
            worst_loss = max([worst_loss, *(abs(a - b) / b for a, b in pairs)])
            assert result["losses"] == pytest.approx(first["losses"], rel=LOSS_TOLERANCE[precision]), what
            assert result["plain"] == first["plain"], what
    print(f"{model} {precision}: {len(saves)} saved, {len(loads)} loaded; losses differ by at most {worst_loss:.1e}")


CASES = [(model, precision) for model in MODELS for precision in LOSS_TOLERANCE]


@pytest.mark.parametrize(("model", "precision"), first_by_day(CASES[::-1]))
def test_any_layout_goes_on_from_any_other(model: str, precision: str, tmp_path: Path) -> None:
    names, case = list(LAYOUTS), CASES.index((model, precision))
    # Each layout saves or loads for one case or another.
    matrix(model, precision, [names[(2 * case + 1) % len(names)]], [names[(2 * case + 2) % len(names)]], tmp_path)


@pytest.mark.night
@pytest.mark.parametrize(("model", "precision"), CASES)
def test_every_layout_goes_on_from_every_other(model: str, precision: str, tmp_path: Path) -> None:
    matrix(model, precision, list(LAYOUTS), list(LAYOUTS), tmp_path)


def test_a_run_with_split_sequences_goes_on_with_whole_ones(tmp_path: Path) -> None:
    matrix("moe", "fp32", ["cp2 ep2 zero"], ["one process"], tmp_path)


@pytest.mark.parametrize("model", first_by_day(WAYS, 2))
def test_each_way_of_sharing_goes_on(model: str, tmp_path: Path) -> None:
    """In another layout, and bit for bit in its own."""
    names, case = [n for n in LAYOUTS if n != "dp4 zero overlap"], list(WAYS).index(model)
    saved_by, loaded_by = (names[(2 * case + shift) % len(names)] for shift in (1, 2))
    matrix(model, "fp32", [saved_by], [loaded_by], tmp_path / "other")
    own = ["pp2 ep2 replicated pool" if case % 2 else "pp2 vpp2 ep2 zero"]
    matrix(model, "fp32", own, own, tmp_path / "own", is_exact=True)
