"""Micro-batches through this rank's part of the model, in a schedule's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.pipeline_parallel.schedule_plan import Plan
from megatron_samoe.pipeline_parallel.schedules import run_plan
from megatron_samoe.training.setup import TrainSetup

Batch = dict[str, Tensor]
#: Takes number, batch and masked losses_T of a micro-batch on the last stage; returns the scalar to differentiate.
LossSink = Callable[[int, Batch, Tensor], Tensor]


def run_micro_batches(
    setup: TrainSetup, plan: Plan, batches: Sequence[Batch], contexts: Sequence[ForwardContext], take_losses: LossSink
) -> Tensor | None:
    """Runs a plan over micro-batches and returns their routing, summed.

    Returns:
        A row for each MoE layer as the model's `statistics` say, zero for those of other stages; None for a dense model.
    """
    model, rows = setup.model, None
    if model.num_moe_layers:
        rows = model.statistics.zeros(model.num_moe_layers, setup.parallel.device)

    def forward(chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
        number = micro_batch
        batch, stage = batches[number], model.chunks[chunk]
        y, all_stats = model(
            batch["tokens"] if x is None else x, contexts[number], batch.get("position_ids"), batch.get("document_ids"),
            chunk=chunk,
        )  # fmt: skip
        for stats in all_stats:
            assert rows is not None
            model.statistics.add(rows, stats)
        if not stage.is_last:
            return y
        return take_losses(number, batch, model.loss(y, batch["labels"]) * batch["loss_mask"].flatten())

    first = contexts[0] if contexts else ForwardContext(batch_size=1)
    run_plan(plan, setup.pipeline, forward, setup.boundary(first.batch_size, first.training))
    return rows
