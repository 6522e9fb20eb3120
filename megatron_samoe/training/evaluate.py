"""The loss on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.training.hook import Record, Training
from megatron_samoe.training.micro_batches import Batch, run_micro_batches
from megatron_samoe.training.setup import TrainSetup


@dataclass(frozen=True)
class EvaluatedLoss:
    """Mean losses per predicted token, nats.

    Attributes:
        mean: over all tokens.
        by_dataset: over those of each dataset of a blend; empty where there is one dataset.
    """

    mean: float
    by_dataset: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(setup: TrainSetup, batches: Iterable[Batch], dataset_names: Sequence[str] = ()) -> EvaluatedLoss:
    """Returns the loss over the data-parallel ranks' batches; no token is ever dropped.

    Every rank passes the same number of batches: experts and stages may lie on other ranks.

    Args:
        dataset_names: of the datasets that the batches' "dataset_ids" number.
    """
    setup.model.begin_step()
    sums_D2 = torch.zeros(max(len(dataset_names), 1), 2, dtype=torch.float64, device=setup.parallel.device)

    def take_losses(batch: Batch, losses_T: Tensor) -> Tensor:
        mask_BS = batch["loss_mask"].double()
        losses_B = losses_T.double().view_as(mask_BS).sum(1)
        ids_B = batch.get("dataset_ids")
        if ids_B is None:
            ids_B = torch.zeros(len(losses_B), dtype=torch.int64, device=losses_B.device)
        sums_D2.index_add_(0, ids_B, torch.stack((losses_B, mask_BS.sum(1)), 1))
        return losses_T.sum()

    left = iter(batches)
    # Each group keeps the pipeline busy, and no more batches are read ahead.
    while group := list(islice(left, 4 * setup.pipeline.size)):
        contexts = [ForwardContext(batch_size=batch["tokens"].shape[0]) for batch in group]
        run_micro_batches(setup, forward_plan(setup.pipeline.num_chunks, len(group)), group, contexts, take_losses)
    sums = setup.parallel.pp.all_reduce(setup.parallel.dp_cp.all_reduce(sums_D2)).tolist()
    by_dataset = {name: loss / tokens for name, (loss, tokens) in zip(dataset_names, sums, strict=False) if tokens}
    loss_sum, num_tokens = math.fsum(loss for loss, _ in sums), math.fsum(tokens for _, tokens in sums)
    return EvaluatedLoss(loss_sum / num_tokens, by_dataset)


def evaluate_run(run: Training, with_test: bool) -> Record:
    """Returns what is recorded of the losses on validation and test data."""
    record: Record = {}
    for name, data in (("validation", run.data.valid), ("test", run.data.test if with_test else None)):
        if data is not None:
            run.watch.begin(f"evaluating {name} data after iteration {run.state.iteration}")
            loss = evaluate(run.setup, run.data.evaluation_batches(data), data.names)
            record |= {f"{name}_loss": loss.mean, f"{name}_perplexity": math.exp(min(loss.mean, 700.0))}
            if loss.by_dataset:
                record[f"{name}_loss_by_dataset"] = dict(loss.by_dataset)
    return record
