"""The lock of a pool moves experts with their optimizer state, and no token notices. test_layout_parity locks in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.moe.candidates import owners, spread
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.checkpointing import model_state, optimizer_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed

LOCKED: dict[str, Any] = {"layout": "moe", "expert_sharing": "pool", "num_experts": 16, "moe_router_topk": 2}
LOCKED |= {"moe_router_score_function": "norm", "moe_router_init_method_std": 0.3, "pool_lock_anneal_steps": 2}
LOCKED |= {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01, "pool_lock_step": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
    "ep2 edp2 zero": (4, {"ep": 2, "zero": True}),
}


def locked(layout: dict[str, Any], **options: Any) -> PretrainConfig:
    return with_layout(with_options(tiny_config(**LOCKED), **options), **layout)


def moved_by_hand(config: PretrainConfig) -> dict[str, Any]:
    """Trains two runs for two steps, and moves the experts of the second as a lock does; returns what it keeps before and
    after, whole, and the losses and gradient norms of the next step of both."""
    nexts = []
    for moves in (False, True):
        setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
        state = initial_state(setup)
        for step in range(2):
            result, state = train_step(setup, state, micro_batches(setup, step))
        assert result.routing is not None
        order_E = spread(owners(result.routing.counts_LE))
        kept = [gather_global({**model_state(setup.model), **optimizer_state(setup)}, setup.parallel)]
        if moves:
            setup.optimizer.reorder_experts(setup.model.global_parameters(), setup.model.expert_dims(), order_E)
            kept.append(gather_global({**model_state(setup.model), **optimizer_state(setup)}, setup.parallel))
        result, _ = train_step(setup, state, micro_batches(setup, 2))
        nexts.append((result.lm_loss, result.grad_norm))
    return {"kept": kept, "order": order_E, "nexts": nexts}


#: Experts of the pool, and routers, of which w1 and the weights do not learn.
FROZEN = {"lr_mult_patterns": (r"^expert_pool\..*\.w1$=0", r"router\.weight$=0")}


@pytest.mark.parametrize(
    ("layout", "options"),
    first_by_day(
        [("ep2 edp2 zero", {"bf16": True}), ("pp2 ep2", {}), ("ep2 edp2 zero", FROZEN), ("pp2 ep2", FROZEN)]
        + [("one process", {}), ("one process", FROZEN)],
        3,
    ),
)
def test_a_new_order_is_only_a_new_order(layout: str, options: dict[str, Any]) -> None:
    world_size, sizes = LAYOUTS.get(layout, (1, {}))
    got = run_ranks(moved_by_hand, world_size, locked(sizes, pool_lock_step=9, **options))[0]
    (before, after), order_E = got["kept"], got["order"]
    assert not torch.equal(order_E, torch.arange(16)), "nothing was moved"
    num_moved = 0
    for name, whole in before.items():
        of_pool = "expert_pool." in name
        moves = of_pool or name.rpartition(".moe.router.")[2] in ("weight", "expert_bias", "candidates")
        num_moved += moves
        wanted = whole.index_select(1 if of_pool else 0, order_E) if moves else whole
        assert torch.equal(after[name], wanted), name
    # Four tensors of the pool, and of four routers three; with two moments of each tensor, and of each router's weight.
    assert num_moved >= (4 + 3 * 2 + 4 * 3 if options == FROZEN else 4 * 3 + 4 * 5)
    for unmoved, moved in zip(*got["nexts"], strict=True):
        assert moved == pytest.approx(unmoved, rel=5e-3 if "bf16" in options else 1e-5)


def counts_after(config: PretrainConfig, steps: int) -> torch.Tensor:
    """Returns the tokens of each layer's experts in the last step."""
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel), torch.float64)
    state = initial_state(setup)
    for step in range(steps):
        result, state = train_step(setup, state, micro_batches(setup, step))
    assert result.routing is not None
    return result.routing.counts_LE


def test_loads_are_even_over_ranks_after_the_lock() -> None:
    counts_LE = run_ranks(counts_after, 2, locked({"ep": 2}), 6)[0]
    for counts_E in counts_LE:
        owned = counts_E.nonzero()[:, 0]
        per_rank = [(owned // 8 == rank).sum().item() for rank in range(2)]
        assert max(per_rank) <= 2, "a layer's four experts lie on two ranks"
    load_L2 = counts_LE.view(4, 2, 8).sum(2)
    assert load_L2.max() < 0.8 * counts_LE.sum(1).max()
