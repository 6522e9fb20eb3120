"""Shapes of the compiled ops' results, for fake and meta tensors (torch.compile, torch.export)."""

from __future__ import annotations

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


def _topk_gate_backward(logits_TE: Tensor, *others: object) -> Tensor:
    return torch.empty_like(logits_TE)


def _make_permutation(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # How many slots are kept is in the data; a device that works asynchronously has a row for each.
    dynamic = not runs_behind_host(ids_TK.device)
    num_rows = torch.library.get_ctx().new_dynamic_size() if dynamic else ids_TK.numel()
    ends_E = ids_TK.new_empty(num_experts, dtype=torch.int32)
    return ids_TK.new_empty(num_rows), torch.empty_like(ids_TK), ids_TK.new_empty(num_experts), ends_E


def _permute(x_TH: Tensor, slot_of_row_N: Tensor, topk: int) -> Tensor:
    return x_TH.new_empty(slot_of_row_N.shape[0], x_TH.shape[1])


def _unpermute(rows_NH: Tensor, probs_TK: Tensor | None, row_of_slot_TK: Tensor) -> Tensor:
    return rows_NH.new_empty(row_of_slot_TK.shape[0], rows_NH.shape[1])


def _unpermute_backward(
    dy_TH: Tensor, rows_NH: Tensor, probs_TK: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_NH), torch.empty_like(probs_TK)


def _combine_banks(coefficients_LGP: Tensor, banks_PGN: Tensor, out_LGN: Tensor) -> None:
    return None


def _combine_banks_backward(coefficients_LGP: Tensor, banks_PGN: Tensor, dW_LGN: Tensor, dbanks_PGN: Tensor) -> Tensor:
    return torch.empty_like(coefficients_LGP)


def _cross_entropy_parts(logits_TV: Tensor, labels_T: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    peak_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
    return peak_T, torch.empty_like(peak_T), torch.empty_like(peak_T)


def _cross_entropy_backward(
    logits_TV: Tensor, labels_T: Tensor, first_id: int, logsumexp_T: Tensor, dloss_T: Tensor
) -> Tensor:
    return torch.empty_like(logits_TV)


def _grouped_mlp(
    x_RH: Tensor,
    rows: list[int],
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    gated: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    width = w2.shape[2] * (2 if gated else 1)
    return torch.empty_like(x_RH), x_RH.new_empty(x_RH.shape[0] if keep_hidden else 0, width)


def _grouped_mlp_backward(dy_RH: Tensor, x_RH: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x_RH)


def _swiglu(hidden_RU: Tensor) -> Tensor:
    return hidden_RU.new_empty(hidden_RU.shape[0], hidden_RU.shape[1] // 2)


def _swiglu_backward(da_RF: Tensor, hidden_RU: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_RU), torch.empty_like(da_RF)


def _adamw(*arguments: object) -> None:
    return None


def register() -> None:
    """Registers the shapes; called once, when the library has been loaded."""
    for function in (
        _topk_gate,
        _topk_gate_backward,
        _make_permutation,
        _permute,
        _unpermute,
        _unpermute_backward,
        _combine_banks,
        _combine_banks_backward,
        _cross_entropy_parts,
        _cross_entropy_backward,
        _grouped_mlp,
        _grouped_mlp_backward,
        _swiglu,
        _swiglu_backward,
        _adamw,
    ):
        torch.library.register_fake(f"megatron_samoe::{function.__name__[1:]}", function)
