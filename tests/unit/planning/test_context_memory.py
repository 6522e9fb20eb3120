"""Memory of long sequences over context-parallel ranks: a step at 32,768 tokens, on tensors without storage."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_samoe.config import PretrainConfig
from tests.harness.pairs import first_by_day
from tests.harness.storageless import step_peak
from tests.harness.tiny import tiny_config, with_layout, with_options

LENGTH, HIDDEN, VOCAB_SIZE = 32768, 256, 1024
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"layout": "dense"},
    "moe": {"layout": "moe"},
    "samoe": {"layout": "samoe"},
    "llama": {"layout": "samoe", "style": "llama", "samoe_combine": "layer", "num_query_groups": 8},
}


def config_at(cp: int, comm_type: str = "p2p", **options: Any) -> PretrainConfig:
    config = tiny_config(
        **{"style": "gpt3", "num_layers": 4, "hidden_size": HIDDEN, "ffn_hidden_size": 4 * HIDDEN, "num_attention_heads": 8,
           "seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 1, "num_experts": 8, "moe_router_topk": 2,
           "bf16": True, **options}
    )  # fmt: skip
    return with_options(with_layout(config, cp=cp), cp_comm_type=comm_type)


@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
@pytest.mark.parametrize("model", first_by_day(LAYOUTS, 2))
def test_the_formula_holds_over_context_parallel_ranks(model: str, comm_type: str) -> None:
    for cp in (1, 2, 4, 8):
        measured, planned, _ = step_peak(config_at(cp, comm_type, **LAYOUTS[model]), VOCAB_SIZE, cp)
        assert measured == pytest.approx(planned, rel=0.01), (cp, measured / 2**20, planned / 2**20)


@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
def test_activations_fall_as_the_number_of_ranks(comm_type: str) -> None:
    """What a step of a dense model adds to what is held before."""
    added = {}
    for cp in (1, 2, 4, 8):
        measured, _, before = step_peak(config_at(cp, comm_type, layout="dense"), VOCAB_SIZE, cp)
        added[cp] = (measured - before) * cp
    assert all(size == pytest.approx(added[1], rel=0.05) for size in added.values()), added


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(results) if isinstance(t, Tensor))])
        return results


@pytest.mark.parametrize("model", LAYOUTS)
def test_no_tensor_of_a_step_has_a_number_for_each_pair_of_tokens(model: str) -> None:
    with Largest() as largest:
        step_peak(config_at(1, **LAYOUTS[model]), VOCAB_SIZE, 1)
    assert LENGTH * HIDDEN <= largest.elements < LENGTH * LENGTH // 8
