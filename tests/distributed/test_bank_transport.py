"""Shared experts travel through shared memory between ranks of one host, and arrive as through the process group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_samoe.moe.sharing.bank_store import BankStore, shard_bank
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.parallel_state.parameter_tag import ParameterTag, set_tag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.row_exchange.exchange import with_exchange
from tests.harness.layout_training import LAYOUTS, assert_same, layout_config, train
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed


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


def test_banks_arrive_whole_and_their_gradients_summed() -> None:
    for rank, ((_, whole, gradient), (through_memory, same, same_gradient)) in enumerate(
        run_ranks(_both_transports, 4)
    ):
        assert through_memory and torch.equal(whole, torch.arange(30.0).view(2, 3, 5)) and torch.equal(same, whole)
        expected = 1 + 10 * whole.view(2, 15)[:, 4 * rank : min(4 * rank + 4, 15)]
        assert torch.equal(gradient, expected) and torch.equal(same_gradient, expected)


def _train_with_both(layout: str, model: str) -> list[dict[str, Any]]:
    config = layout_config(layout, model)
    return [train(config, exchange="torch"), train(config, exchange="extension")]


@pytest.mark.parametrize("model", first_by_day(["samoe step", "pool", "samoe many banks", "samoe layer", "tied"], 2))
def test_training_is_the_same_through_both(model: str) -> None:
    through_group, through_memory = run_ranks(_train_with_both, LAYOUTS["pp2 ep2 zero"][0], "pp2 ep2 zero", model)[0]
    assert_same(through_memory, through_group, rtol=1e-5)
