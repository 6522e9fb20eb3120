"""A number that stops being one: named with its step, layer and rank, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import NonFiniteLossError
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.checkpointing import load_run, save_run
from megatron_samoe.training.non_finite import raise_non_finite
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import train_step
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import micro_batches, started, tiny_config, with_layout, with_options

TABLE = table(__file__)


def start(config: PretrainConfig) -> tuple[TrainSetup, TrainState]:
    return started(config, parallel=initialize_model_parallel(config.parallel))


def failing_step(setup: TrainSetup, state: TrainState) -> str:
    """Returns the message of a step that must fail, having checked that no weight moved."""
    before = {n: p.detach().clone() for n, p in setup.model.global_parameters().items()}
    batches = micro_batches(setup, state.iteration)
    result, after = train_step(setup, state, batches)
    assert not result.is_finite and after == state
    for name, p in setup.model.global_parameters().items():
        assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)), f"{name} was updated"
    with pytest.raises(NonFiniteLossError) as raised:
        raise_non_finite(setup, state, batches, result)
    return str(raised.value)


def poison(setup: TrainSetup, name: str) -> None:
    with torch.no_grad():
        setup.model.global_parameters()[name].fill_(float("nan"))


@pytest.mark.parametrize(("name", "place"), TABLE["places"])
@pytest.mark.parametrize("layout", ["moe", "samoe"])
def test_the_place_is_named(layout: str, name: str, place: str) -> None:
    setup, state = start(tiny_config(layout))
    _, state = train_step(setup, state, micro_batches(setup, 0))
    poison(setup, name)
    message = failing_step(setup, state)
    assert "Iteration 2: loss nan" in message
    assert f"first seen in {place} on rank 0, micro-batch 0" in message
    assert "No weight was changed. Nothing was saved, since there is neither --save nor --run-dir." in message


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_the_place_is_named_with_recomputation(recompute: str | None) -> None:
    setup, state = start(tiny_config("samoe", recompute_granularity=recompute, hidden_dropout=0.1))
    poison(setup, "layers.1.mlp_norm.weight")
    assert "first seen in layer 1 on rank 0, micro-batch 0" in failing_step(setup, state)


def test_a_gradient_that_overflows_behind_a_finite_loss_is_named() -> None:
    setup, state = start(tiny_config("dense", num_layers=2))

    def blow_up(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf

    setup.model.global_parameters()["layers.1.mlp.fc1.weight"].register_hook(blow_up)
    batches = micro_batches(setup, 0)
    result, _ = train_step(setup, state, batches)
    assert result.lm_loss == pytest.approx(4.6, abs=0.2) and not result.is_finite
    with pytest.raises(NonFiniteLossError, match=r"the gradient of layers\.1\.mlp\.fc1\.weight"):
        raise_non_finite(setup, state, batches, result)


def on_one_rank(config: PretrainConfig, name: str) -> str:
    setup, state = start(config)
    _, state = train_step(setup, state, micro_batches(setup, 0))
    save_run(setup, state)
    if setup.parallel.rank == 1:
        poison(setup, name)
    message = failing_step(setup, state)
    # The checkpoint still brings the run back.
    found = store.find_checkpoint(setup.config.checkpoint)
    assert found is not None
    again = load_run(setup, state, found)
    result, _ = train_step(setup, again, micro_batches(setup, again.iteration))
    assert result.is_finite
    return message


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "sizes", "name"),
    [("dense", {"tp": 2}, "layers.1.mlp.fc1.weight"), ("moe", {"ep": 2}, "layers.1.moe.experts.w1")],
)
def test_the_layer_is_named_in_split_models(layout: str, sizes: dict[str, Any], name: str, tmp_path: Path) -> None:
    config = with_layout(tiny_config(layout), **sizes)
    config = with_options(config, save=str(tmp_path), load=str(tmp_path))
    layer = name.split(".")[1]
    messages = run_ranks(on_one_rank, 2, config, name)
    assert messages[0] == messages[1]
    assert f"first seen in layer {layer} on rank" in messages[0]
