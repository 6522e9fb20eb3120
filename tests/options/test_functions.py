"""What an option changes of a model: its numbers, by the formula of its documentation, and shapes of weights, by hand (`shapes.yaml`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.checkpointing import model_state
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, global_batch, micro_batches, tiny_config

SHAPES = table(str(Path(__file__).with_name("shapes.py")))


def setup(layout: str = "dense", **options: Any) -> TrainSetup:
    return build_setup(tiny_config(layout, **options), VOCAB_SIZE, single_process_state(), torch.float64)


def logits(made: TrainSetup) -> Tensor:
    tokens = global_batch(made.config, 0)["tokens"]
    with torch.no_grad():
        return made.model(tokens, ForwardContext(batch_size=len(tokens), training=False))[0][:, :VOCAB_SIZE]


def test_logits_are_capped() -> None:
    plain, capped = (logits(setup(init_method_std=0.3, final_logit_softcapping=c)) for c in (None, 1.5))
    torch.testing.assert_close(capped, 1.5 * (plain / 1.5).tanh())
    assert (plain - capped).abs().max() > 1


def test_dropout_takes_its_share_of_embeddings() -> None:
    made = setup(hidden_dropout=0.3)
    norm = next(m for n, m in made.model.named_modules() if n.endswith("0.attention_norm"))
    inputs: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    train_step(made, initial_state(made), micro_batches(made, 0))
    assert abs(float((torch.cat(inputs) == 0).double().mean()) - 0.3) < 0.02


def test_the_weight_of_relus_loss_moves_by_its_rate() -> None:
    """Half of 8 experts are visited at first, more than the 2 that are asked for."""
    made = setup(
        "moe", moe_router_score_function="relu", num_experts=8, moe_router_topk=2, moe_router_relu_update_rate=0.5
    )
    train_step(made, initial_state(made), micro_batches(made, 0))
    assert [float(layer.moe.router.loss_weight) for layer in made.model.moe_layers()] == [1.5] * 4


@pytest.mark.parametrize(("scope", "expected"), [("set", [25.0, 25.0]), ("layer", [50.0, 0.0])])
def test_loads_are_balanced_over_a_set_or_a_layer(scope: str, expected: list[float]) -> None:
    """Of a pool, whose loads are a set's by default."""
    made = setup("moe", expert_sharing="pool", num_experts=2, moe_router_topk=1, moe_balance_scope=scope, num_layers=2)
    first, _ = made.model.balanced_counts(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
    assert first.tolist() == expected


def test_experts_choose_as_many_tokens_each() -> None:
    """S * K / E of each sequence."""
    made = setup("moe", moe_router_expert_choice=True, moe_router_load_balancing_type="none", moe_router_topk=2)
    result, _ = train_step(made, initial_state(made), micro_batches(made, 0))
    assert result.routing is not None
    assert result.routing.counts_LE.tolist() == [[8 * 16 * 2 / 4] * 4] * 4


def test_a_model_of_half_precision_computes_in_it_and_keeps_masters() -> None:
    """Logits have seven binary digits after the first; a step of a ten-thousandth, which those would lose, is kept."""
    config = tiny_config("dense", bf16=True, lr=1e-4, lr_decay_style="constant", weight_decay=0.0)
    made = build_setup(config, VOCAB_SIZE, single_process_state())
    weight = made.model.global_parameters()["layers.0.mlp_norm.weight"]
    for step in range(3):
        train_step(made, initial_state(made), micro_batches(made, step))
    assert weight.dtype == torch.bfloat16
    assert made.optimizer.masters["layers.0.mlp_norm.weight"].float().sub(1).abs().max() > 1e-5
    assert torch.equal(logits(made), logits(made).bfloat16().to(logits(made).dtype))


def test_an_expert_of_a_locked_pool_is_one_layers() -> None:
    """As tokens are counted two steps after the lock, whose scores fall within one step."""
    locked = {"pool_lock_step": 2, "pool_lock_anneal_steps": 1, "num_experts": 8, "moe_router_topk": 2}
    made = setup("moe", expert_sharing="pool", num_layers=2, **locked)
    state = initial_state(made)
    for step in range(5):
        result, state = train_step(made, state, micro_batches(made, step))
    assert result.routing is not None
    users_E = (result.routing.counts_LE > 0).sum(0)
    assert users_E.max() == 1, result.routing.counts_LE


@pytest.mark.parametrize("option", SHAPES)
def test_a_weight_has_the_shape_that_an_option_says(option: str) -> None:
    value, others, weight, shape = SHAPES[option]
    config = tiny_config(**{"layout": "dense", **others, option: value})
    model = build_setup(config, VOCAB_SIZE, single_process_state()).model
    shapes = {name: tuple(parts[0].global_shape) for name, parts in model_state(model).items()}
    assert shapes.get(weight) == shape, shapes
    assert max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")) == config.model.num_layers - 1
