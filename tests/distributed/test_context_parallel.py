"""What sequences bring besides tokens (documents, positions, masked labels) is split with them; and they are evaluated."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.blueprint import ModelParts
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import RankModel, build_model
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import RankGrid, initialize_model_parallel
from megatron_samoe.parallel_state.state import planned_state
from megatron_samoe.planning.description import PlannedModel
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients
from tests.harness.kept_bytes import kept_by_autograd
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout

pytestmark = pytest.mark.distributed

PACKED: dict[str, Any] = {"eod_mask_loss": True, "init_method_std": 0.2}
DOCUMENTS = {"reset_attention_mask": True, "moe_expert_capacity_factor": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "documents": {"layout": "moe", "style": "llama", **PACKED, **DOCUMENTS},
    "learned positions": {"layout": "dense", **PACKED},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "cp2 a2a": (2, {"cp": 2, "comm": "a2a"}),
    "cp2 a2a pp2 zero": (4, {"cp": 2, "comm": "a2a", "pp": 2, "zero": True}),
    "cp4": (4, {"cp": 4}),
    "cp2 dp2": (4, {"cp": 2}),
}


def packed(batch: dict[str, Tensor], has_documents: bool) -> dict[str, Tensor]:
    """Returns a micro-batch of sequences that each hold documents, whose positions begin anew and whose ends have no label."""
    tokens = batch["tokens"]
    ids_BS = (tokens % 5 == 0).long().cumsum(1)
    changes = torch.ones_like(ids_BS, dtype=torch.bool)
    changes[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    positions = places - (places * changes).cummax(1).values
    more = {"document_ids": ids_BS} if has_documents else {}
    return {**batch, "position_ids": positions, "loss_mask": (tokens % 5 != 4).float(), **more}


def outcome(layout: str) -> dict[str, Any] | None:
    """Returns the loss, all gradients and the evaluated loss of every model, on the first rank."""
    results = {}
    for model, options in MODELS.items():
        if LAYOUTS[layout][1].get("comm") != "a2a" and model == "documents" and layout != "one process":
            continue
        config = with_layout(tiny_config(**options), **LAYOUTS[layout][1])
        setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel), torch.float64)
        batches = [packed(batch, model == "documents") for batch in micro_batches(setup, 0)]
        evaluated = evaluate(setup, batches).mean
        loss, num_tokens, *_ = compute_gradients(setup, initial_state(setup), batches)
        pieces = {p.name: sharded(p.grad, p.tag.shard, setup.parallel, p.slice) for p in setup.buffers.pieces}
        gradients = gather_global(pieces, setup.parallel)
        results[model] = {"loss": loss, "tokens": num_tokens, "evaluated": evaluated, "gradients": gradients}
    return results if not dist.is_initialized() or dist.get_rank() == 0 else None


@cache
def outcome_of(layout: str) -> dict[str, Any]:
    return run_ranks(outcome, LAYOUTS[layout][0], layout)[0]


@pytest.mark.parametrize("layout", first_by_day([name for name in LAYOUTS if name != "one process"], 2))
def test_documents_positions_and_masks_are_split_with_sequences(layout: str) -> None:
    found = outcome_of(layout)
    assert "learned positions" in found
    for model, result in found.items():
        expected = outcome_of("one process")[model]
        assert result["tokens"] == expected["tokens"] < 8 * 16
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-11)
        assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-11)
        for name, gradient in expected["gradients"].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-9, atol=1e-11 * max(scale, 1e-3))


def kept(config: PretrainConfig) -> int:
    model = build_model(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    return kept_by_autograd(model, config)


ROTARY, GROUPED = {"position_embedding_type": "rope"}, {"group_query_attention": True, "num_query_groups": 2}


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
@pytest.mark.parametrize(
    "options", [{}, {"layout": "moe"}, ROTARY, GROUPED, {**ROTARY, **GROUPED, "clip_qkv": 0.1}], ids=str
)
def test_a_layer_keeps_what_it_says(options: dict[str, Any], comm: str) -> None:
    given = {"layout": "dense", "hidden_size": 64, "seq_length": 64, "ffn_hidden_size": 192, **options}
    config = with_layout(tiny_config(**given), cp=2, comm=comm)
    batch = config.training.micro_batch_size
    expected = PlannedModel(config, VOCAB_SIZE, 2).description.trace(all_layers(config)[0], batch)
    for found in run_ranks(kept, 2, config):
        assert found == pytest.approx(expected.kept_bytes, rel=0.05)


class OtherAttention(torch.nn.Module):
    """Attention from outside that knows nothing of other ranks."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


def test_attention_from_outside_that_knows_no_other_ranks_is_refused() -> None:
    config = with_layout(tiny_config("dense"), cp=2)
    state = planned_state(RankGrid.of(config.parallel, 2), 0)
    with pytest.raises(ConfigError, match="--context-parallel-size = 2: must be 1 with attention from outside"):
        RankModel(config, VOCAB_SIZE, state, torch.float32, ModelParts(attention=OtherAttention))


def test_a_mask_from_outside_is_refused() -> None:
    config = with_layout(tiny_config("dense"), cp=2)
    state = planned_state(RankGrid.of(config.parallel, 2), 0)
    attention = RankModel(config, VOCAB_SIZE, state, torch.float32).chunks[0].layers["0"].attention
    q = torch.zeros(1, 8, 4, 8, device="meta")
    inputs = AttentionInputs(mask_B1SS=torch.ones(1, 1, 8, 8, dtype=torch.bool, device="meta"))
    with pytest.raises(ConfigError, match="--context-parallel-size = 2: must be 1 with attention that brings a mask"):
        attention.core(q, q, q, inputs, ForwardContext(1))
