"""Operations of layers that run without storage, against products counted by hand and what collectives send."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.planning.description import PlannedModel
from megatron_samoe.planning.recorder import Operation
from megatron_samoe.planning.traces import Trace
from tests.harness.tiny import tiny_config, with_layout

BATCH, LENGTH, HIDDEN, HEADS, KV_HEADS, WIDTH, FFN, EXPERTS, TOPK = 2, 64, 128, 8, 2, 16, 192, 8, 2
TOKENS = BATCH * LENGTH


def trace(world: int = 1, sizes: dict[str, Any] | None = None, **options: Any) -> Trace:
    """Returns the trace of the first layer of a Llama-like MoE, in bf16."""
    config = tiny_config(
        **{"layout": "moe", "style": "llama", "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
           "num_query_groups": KV_HEADS, "seq_length": LENGTH, "micro_batch_size": BATCH, "num_experts": EXPERTS,
           "moe_router_topk": TOPK, "moe_ffn_hidden_size": FFN, "bf16": True, **options}
    )  # fmt: skip
    config = with_layout(config, **(sizes or {}))
    selective = config.training.recompute_granularity == "selective"
    return PlannedModel(config, 103, world).description.trace(all_layers(config)[0], BATCH, selective)


def of_kind(operations: tuple[Operation, ...], kind: str) -> list[Operation]:
    return [operation for operation in operations if operation.kind == kind]


def test_products_are_those_of_the_layer() -> None:
    found = {(o.name, o.shape): o.flops for o in of_kind(trace().forward, "product")}
    rows = TOKENS * TOPK
    assert found == {
        ("mm", (1, TOKENS, (HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN)): 2
        * TOKENS
        * (HEADS + 2 * KV_HEADS)
        * WIDTH
        * HIDDEN,
        ("mm", (1, TOKENS, HIDDEN, HEADS * WIDTH)): 2 * TOKENS * HIDDEN * HEADS * WIDTH,
        ("mm", (1, TOKENS, EXPERTS, HIDDEN)): 2 * TOKENS * EXPERTS * HIDDEN,
        ("grouped_mm", (EXPERTS, rows // EXPERTS, 2 * FFN, HIDDEN)): 2 * rows * 2 * FFN * HIDDEN,
        ("grouped_mm", (EXPERTS, rows // EXPERTS, HIDDEN, FFN)): 2 * rows * FFN * HIDDEN,
    }


def test_a_backward_pass_has_two_products_for_each_and_attention_makes_its_scores_again() -> None:
    one = trace()
    forward, backward = (sum(o.flops for o in of_kind(part, "product")) for part in (one.forward, one.backward))
    assert backward == 2 * forward
    (attention,), (gradients,) = of_kind(one.forward, "attention"), of_kind(one.backward, "attention")
    assert attention.shape == gradients.shape == (BATCH, HEADS, LENGTH, LENGTH, WIDTH)
    assert attention.flops == 2 * 2 * BATCH * HEADS * WIDTH * LENGTH * (LENGTH + 1) / 2
    assert gradients.flops == 2.5 * attention.flops


def test_a_window_leaves_the_pairs_within_it() -> None:
    (attention,) = of_kind(trace(sliding_window=5).forward, "attention")
    pairs = sum(min(query + 1, 5) for query in range(LENGTH))
    assert attention.flops == 2 * 2 * BATCH * HEADS * WIDTH * pairs


def test_selective_recomputation_runs_the_core_again() -> None:
    plain, selective = trace(), trace(recompute_granularity="selective")
    assert selective.forward == plain.forward
    assert sum(o.flops for o in selective.backward) - sum(o.flops for o in plain.backward) == sum(
        o.flops for o in of_kind(plain.forward, "attention")
    )
    # Its output, and a sum for each query.
    assert plain.kept_bytes - selective.kept_bytes == TOKENS * HEADS * 4


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_exchange_hidden_states(sequence_parallel: bool) -> None:
    one = trace(2, {"tp": 2, "sp": sequence_parallel, "ep": 1})
    sent: dict[str, float] = {}
    for operation in of_kind(one.forward + one.backward, "collective"):
        assert operation.group == "tp"
        if operation.shape[-1] == HIDDEN:
            sent[operation.name] = sent.get(operation.name, 0) + operation.sent_bytes
    whole = TOKENS * HIDDEN * 2
    # Attention and experts each: a sum forwards and one backwards, or a gather and a scatter each.
    assert sum(sent.values()) == pytest.approx(2 * 2 * 2 * whole / 2)
    assert set(sent) == ({"all_gather", "reduce_scatter"} if sequence_parallel else {"all_reduce"})


def test_a_trace_leaves_no_storage_behind() -> None:
    """Weights and what is cached are not counted, so a second trace is the same."""
    assert trace(sliding_window=16) == trace(sliding_window=16)
    assert torch.is_grad_enabled()
