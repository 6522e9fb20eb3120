"""Shared experts on several ranks: banks gathered and their gradients summed, copies that drift apart, coefficients, what combined
experts take, and the lock of a pool, which moves experts with their optimizer state so that no token notices (test_layout_parity
locks in every layout).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_samoe.config import PretrainConfig
from megatron_samoe.errors import ReplicaDriftError
from megatron_samoe.moe.candidates import owners, spread
from megatron_samoe.moe.sharing.bank_store import BankStore, shard_bank
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.parallel_state.parameter_tag import ParameterTag, set_tag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.training.checkpointing import model_state, optimizer_state
from megatron_samoe.training.hooks.moe_diagnostics import gathered_coefficients
from megatron_samoe.training.hooks.replica_check import check_pool_replicas
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.kept_bytes import lent_tensors
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, gather_global, micro_batches, tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed
TABLE = table(__file__)


def _both_transports() -> list[tuple[bool, torch.Tensor, torch.Tensor]]:
    state = initialize_model_parallel(with_layout(tiny_config("samoe"), pp=2).parallel)
    results = []
    for backend in ("torch", "extension"):
        there = replace(state, pool_dp=with_exchange(state.pool_dp, state.device, backend=backend))  # type: ignore[arg-type]
        # 2 banks of 15 numbers, which four holders cannot share evenly.
        bank = set_tag(nn.Parameter(torch.empty(2, 3, 5)), ParameterTag(ShardSpec("pool")))
        part = shard_bank(bank, there)
        store = BankStore(part, there)
        columns = store.columns(store.group.rank)
        part.data.copy_(torch.arange(30.0).view(2, 15)[:, columns])
        part.main_grad = torch.ones_like(part)  # type: ignore[attr-defined]
        whole = store.unsharded()
        store.add_gradient(whole * (1 + there.rank))
        results.append((store.group.exchange is not None, whole, part.main_grad))  # type: ignore[attr-defined]
    return results


def test_banks_arrive_whole_and_their_gradients_summed_over_the_process_group_and_shared_memory() -> None:
    for rank, ((_, whole, gradient), (through_memory, same, same_gradient)) in enumerate(
        run_ranks(_both_transports, 4)
    ):
        assert through_memory and torch.equal(whole, torch.arange(30.0).view(2, 3, 5)) and torch.equal(same, whole)
        expected = 1 + 10 * whole.view(2, 15)[:, 4 * rank : min(4 * rank + 4, 15)]
        assert torch.equal(gradient, expected) and torch.equal(same_gradient, expected)


def drift() -> list[str]:
    """Returns what is said of copies after a step, and once more with one element of the last rank's bank changed."""
    config = with_layout(tiny_config("samoe", samoe_pool_placement="replicated"), pp=2)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    train_step(setup, initial_state(setup), micro_batches(setup, 0))
    said = []
    for change in (0.0, 1e-6):
        if setup.parallel.rank == 3:
            with torch.no_grad():
                setup.model.expert_pool["combined"].bank["w2"].view(-1)[7] += change
        try:
            check_pool_replicas(setup, iteration=1)
            said.append("")
        except ReplicaDriftError as error:
            said.append(str(error))
    return said


def test_equal_copies_pass_and_one_that_differs_is_named_by_its_holders() -> None:
    before, after = zip(*run_ranks(drift, 4), strict=True)
    assert not any(before)
    # Ranks 1 and 3 hold the copies of one data-parallel rank, 0 and 2 those of the other, all of the same pool.
    assert any(after)
    assert all("w2 differ" in report and "[3]" in report for report in after if report)


def gathered(ep: int, options: dict[str, Any]) -> torch.Tensor:
    config = with_layout(tiny_config(**options, samoe_granularity="expert", samoe_init="uniform"), ep=ep)
    return gathered_coefficients(build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel)))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_expert_banks": 1}, {"layout": "moe", "expert_sharing": "scaled:combined,0,0,combined"}],
    ids=str,
)
def test_two_ranks_show_the_coefficients_of_one_process(options: dict[str, Any]) -> None:
    alone = gathered(1, options)
    assert alone.shape[2] == 4 and alone[0].abs().min() > 0
    for a_L2GP in run_ranks(gathered, 2, 2, options):
        torch.testing.assert_close(a_L2GP, alone)


def folded_bytes(config: PretrainConfig) -> int:
    """Returns the bytes of combined experts and of their gradients that a rank holds after a step, what tensors share counted once."""
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    train_step(setup, initial_state(setup), micro_batches(setup, 0))
    own = {p.untyped_storage().data_ptr() for p in setup.model.parameters()}
    own |= {p.main_grad.untyped_storage().data_ptr() for p in setup.buffers.parameters.values()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in lent_tensors(setup.model.lender)}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize(("model", "sizes"), first_by_day(TABLE["measured"], 3))
def test_a_rank_holds_the_combined_experts_that_were_planned(model: dict[str, Any], sizes: dict[str, Any]) -> None:
    """tests/unit/planning/test_memory.py compares all else that a rank holds between steps."""
    config = with_layout(tiny_config(**model), **sizes)
    for rank, held in enumerate(run_ranks(folded_bytes, 4, config)):
        planned = rank_memory(config, VOCAB_SIZE, 4, rank)
        assert held == planned.folded_weights + planned.folded_gradients, rank


def locked(layout: dict[str, Any], **options: Any) -> PretrainConfig:
    return with_layout(with_options(tiny_config(**TABLE["locked"]), **options), **layout)


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


@pytest.mark.parametrize(("world_size", "sizes", "options"), first_by_day(TABLE["moved"], 3))
def test_a_new_order_is_only_a_new_order(world_size: int, sizes: dict[str, Any], options: dict[str, Any]) -> None:
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
    assert num_moved >= (4 + 3 * 2 + 4 * 3 if "lr_mult_patterns" in options else 4 * 3 + 4 * 5)
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
