"""Ranks that each hold a part of every sequence: attention in a ring against its reference; what sequences bring besides tokens
(documents, positions, masked labels) is split with them; and they are evaluated."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.blueprint import ModelParts
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import ScoreRule
from megatron_samoe.parallel_state import RankGrid, initialize_model_parallel
from megatron_samoe.parallel_state.state import planned_state
from megatron_samoe.parallel_state.token_share import whole_sequences
from megatron_samoe.tensor_parallel.ring_attention import ring_attention
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients
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
    with pytest.raises(
        ConfigError, match="--context-parallel-size = 2: must be 1 with an attention class that sets a mask"
    ):
        attention.core(q, q, q, inputs, ForwardContext(1))


def inputs(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns queries, keys, values and gradients of the result, of whole sequences."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, heads, length, 6), (2, groups, length, 6), (2, groups, length, 6), (2, heads, length, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attend(length: int, heads: int, groups: int, scale: float | None, dtype: torch.dtype) -> list[Tensor] | None:
    """Returns result and gradients of whole sequences on the first rank."""
    size = dist.get_world_size()
    state = initialize_model_parallel(ParallelConfig(context_parallel_size=size))
    *parts, dy = (state.token_share.of_sequences(t, 2) for t in inputs(length, heads, groups, dtype))
    own = [t.requires_grad_() for t in parts]
    y = ring_attention(*own, state.cp, scale)
    found = []
    for t in (y, *torch.autograd.grad(y, own, dy)):
        of_ranks = state.cp.all_gather(t.detach().transpose(1, 2).contiguous()[None])
        found.append(whole_sequences(of_ranks, size).transpose(1, 2))
    return found if state.rank == 0 else None


def attend_all(cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    return [attend(*case) for case in cases]


CASES = [
    (24, 4, 4, None, torch.float64),
    (24, 4, 2, 0.7, torch.float64),
    (48, 6, 1, None, torch.float64),
    (24, 4, 2, None, torch.float32),
    (24, 4, 2, 0.7, torch.bfloat16),
]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ring_is_the_twin_with_all_gradients(size: int) -> None:
    for case, found in zip(CASES, run_ranks(attend_all, size, CASES)[0], strict=True):
        length, heads, groups, scale, dtype = case
        q, k, v, dy = (t.double() for t in inputs(length, heads, groups, dtype))
        wanted = [t.requires_grad_() for t in (q, k, v)]
        expected = reference.attention(q, k, v, ScoreRule(scale=scale))
        rtol = TOLERANCES[dtype]
        for got, right in zip(found, (expected, *torch.autograd.grad(expected, wanted, dy)), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), right, rtol=rtol, atol=rtol, msg=lambda m, c=case: f"{c}: {m}")
