"""The loss on held-out samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.training.micro_batches import Batch, run_micro_batches
from megatron_samoe.training.setup import TrainSetup


@torch.no_grad()
def evaluate(setup: TrainSetup, batches: Iterable[Batch]) -> float:
    """Returns the mean loss per predicted token over the data-parallel ranks' batches; no token is ever dropped.

    Every rank passes the same number of batches: experts and stages may lie on other ranks.
    """
    setup.model.begin_step()
    sums = torch.zeros(2, dtype=torch.float64, device=setup.parallel.device)

    def take_losses(_number: int, batch: Batch, losses_T: Tensor) -> Tensor:
        sums.add_(torch.stack((losses_T.sum().double(), batch["loss_mask"].sum().double())))
        return losses_T.sum()

    for group in _groups(batches, setup.pipeline.size):
        contexts = [ForwardContext(batch_size=batch["tokens"].shape[0]) for batch in group]
        run_micro_batches(setup, forward_plan(setup.pipeline.num_chunks, len(group)), group, contexts, take_losses)
    loss_sum, num_tokens = setup.parallel.pp.all_reduce(setup.parallel.dp.all_reduce(sums)).tolist()
    return loss_sum / num_tokens


def _groups(batches: Iterable[Batch], size: int) -> Iterable[list[Batch]]:
    """Yields lists of a few batches, enough to keep all pipeline stages busy without reading everything ahead."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == 4 * size:
            yield group
            group = []
    if group:
        yield group
