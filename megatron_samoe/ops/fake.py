"""Shapes of the compiled ops' results, for fake and meta tensors (torch.compile, torch.export)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.ops.asynchronous import runs_behind_host


def _topk_gate(
    logits_TE: Tensor, topk: int, sigmoid: bool, pre_softmax: bool, num_groups: int, key_TE: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    return (
        logits_TE.new_empty(num_tokens, topk),
        logits_TE.new_empty(num_tokens, topk, dtype=torch.int64),
        logits_TE.new_empty(num_groups, num_experts, dtype=torch.int64),
        logits_TE.new_empty(num_groups, num_experts),
        logits_TE.new_empty(()),
        logits_TE.new_empty(num_tokens),
    )


def _make_permutation(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # How many slots are kept is in the data; a device that works asynchronously has a row for each.
    dynamic = not runs_behind_host(ids_TK.device)
    num_rows = torch.library.get_ctx().new_dynamic_size() if dynamic else ids_TK.numel()
    ends_E = ids_TK.new_empty(num_experts, dtype=torch.int32)
    return ids_TK.new_empty(num_rows), torch.empty_like(ids_TK), ids_TK.new_empty(num_experts), ends_E


def _cross_entropy_parts(logits_TV: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    peak_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
    return peak_T, torch.empty_like(peak_T), torch.empty_like(peak_T)


def _grouped_mlp(x_RH: Tensor, rows: list[int], w1: Tensor, w2: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, gated, keep_hidden = others
    width = w2.shape[2] * (2 if gated else 1)
    return torch.empty_like(x_RH), x_RH.new_empty(x_RH.shape[0] if keep_hidden else 0, width)


def _as_first(first: Tensor, *others: object) -> Tensor:
    return torch.empty_like(first)


def _nothing(*arguments: object) -> None:
    return None


#: What gives the results' shapes from an op's arguments.
SHAPES: dict[str, Callable[..., Any]] = {
    "topk_gate": _topk_gate,
    "make_permutation": _make_permutation,
    "permute": lambda x_TH, slot_of_row_N, topk: x_TH.new_empty(slot_of_row_N.shape[0], x_TH.shape[1]),
    "unpermute": lambda rows_NH, probs_TK, slots_TK: rows_NH.new_empty(slots_TK.shape[0], rows_NH.shape[1]),
    "unpermute_backward": lambda dy, rows_NH, probs_TK, *_: (torch.empty_like(rows_NH), torch.empty_like(probs_TK)),
    "cross_entropy_parts": _cross_entropy_parts,
    "grouped_mlp": _grouped_mlp,
    "swiglu": lambda hidden_RU: hidden_RU.new_empty(hidden_RU.shape[0], hidden_RU.shape[1] // 2),
    "swiglu_backward": lambda da_RF, hidden_RU: (torch.empty_like(hidden_RU), torch.empty_like(da_RF)),
    **dict.fromkeys(("combine_banks", "adamw"), _nothing),
    **dict.fromkeys(("topk_gate_backward", "combine_banks_backward"), _as_first),
    **dict.fromkeys(("cross_entropy_backward", "grouped_mlp_backward"), _as_first),
}


def register() -> None:
    """Registers the shapes; called once, when the library has been loaded."""
    for name, shape in SHAPES.items():
        torch.library.register_fake(f"megatron_samoe::{name}", shape)
