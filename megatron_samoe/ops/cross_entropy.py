"""Softmax cross-entropy over a part of the vocabulary, without keeping the probabilities.

The forward returns three numbers a token; ranks that hold parts of the vocabulary make the loss from these. The
backward makes the gradient from the logits. Both are plain functions that autograd does not record:
tensor_parallel/cross_entropy.py reduces over ranks between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.ops import extension, reference


def _check(logits_TV: Tensor, labels_T: Tensor) -> None:
    if logits_TV.dim() != 2 or labels_T.shape != logits_TV.shape[:1] or labels_T.dtype != torch.int64:
        labels = f"{labels_T.dtype} {tuple(labels_T.shape)}"
        raise ValueError(f"labels_T is {labels}, logits_TV {tuple(logits_TV.shape)}: one int64 a token")


@torch.no_grad()
def cross_entropy_parts(logits_TV: Tensor, labels_T: Tensor, first_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns peak_T, sum_T and target_T in fp32 (fp64 for fp64 logits). With all columns here, loss = log(sum) + peak
    - target.

    Args:
        logits_TV: columns first_id .. first_id + V - 1 of the vocabulary, fp32, bf16 or fp64; V may be 0 (then peak is
            -inf and sum 0).
        labels_T: ids in the full vocabulary; target is 0 where the label is in another part.

    Raises:
        ValueError: the labels do not fit the logits.
    """
    _check(logits_TV, labels_T)
    if extension.serves(logits_TV, labels_T):
        peak_T, sum_T, target_T = torch.ops.megatron_samoe.cross_entropy_parts(
            logits_TV.contiguous(), labels_T.contiguous(), first_id
        )
        return peak_T, sum_T, target_T
    return reference.cross_entropy_parts(logits_TV, labels_T, first_id)


@torch.no_grad()
def cross_entropy_backward(
    logits_TV: Tensor, labels_T: Tensor, first_id: int, logsumexp_T: Tensor, dloss_T: Tensor
) -> Tensor:
    """Returns dlogits_TV in the logits' dtype.

    Args:
        logits_TV, labels_T, first_id: as in the forward.
        logsumexp_T: over the full vocabulary, fp32 (fp64 for fp64 logits).
        dloss_T: gradient of each token's loss, of the same dtype.

    Raises:
        ValueError: the labels do not fit the logits.
    """
    _check(logits_TV, labels_T)
    if extension.serves(logits_TV, labels_T, logsumexp_T, dloss_T):
        dlogits_TV: Tensor = torch.ops.megatron_samoe.cross_entropy_backward(
            logits_TV.contiguous(), labels_T.contiguous(), first_id, logsumexp_T.contiguous(), dloss_T.contiguous()
        )
        return dlogits_TV
    return reference.cross_entropy_backward(logits_TV, labels_T, first_id, logsumexp_T, dloss_T)
