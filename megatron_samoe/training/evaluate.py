"""The loss on held-out samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.train_step import Batch


@torch.no_grad()
def evaluate(setup: TrainSetup, batches: Iterable[Batch]) -> float:
    """Returns the mean loss per predicted token over the data-parallel ranks' batches; no token is ever dropped.

    Every rank passes the same number of batches: experts may lie on other ranks.
    """
    setup.model.begin_step()
    sums = torch.zeros(2, dtype=torch.float64, device=setup.parallel.device)
    for batch in batches:
        context = ForwardContext(batch_size=batch["tokens"].shape[0])
        logits_TV, _ = setup.model(batch["tokens"], context, batch.get("position_ids"), batch.get("document_ids"))
        mask_T = batch["loss_mask"].flatten()
        sums[0] += (setup.model.loss(logits_TV, batch["labels"]) * mask_T).sum()
        sums[1] += mask_T.sum()
    loss_sum, num_tokens = setup.parallel.dp.all_reduce(sums).tolist()
    return loss_sum / num_tokens
