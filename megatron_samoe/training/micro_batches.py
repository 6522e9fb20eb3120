"""Micro-batches through this rank's part of the model, in a schedule's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.token_share import TokenShare
from megatron_samoe.pipeline_parallel.schedule_plan import Plan
from megatron_samoe.pipeline_parallel.schedules import run_plan
from megatron_samoe.training.setup import TrainSetup

Batch = dict[str, Tensor]
#: What a batch has for each token of its sequences, [B, S].
BY_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")
#: Takes a micro-batch and its masked losses_T, of the rank's tokens, on the last stage; returns the scalar to differentiate.
LossSink = Callable[[Batch, Tensor], Tensor]


def own_part(batch: Batch, share: TokenShare) -> Batch:
    """Returns the part of a micro-batch's sequences that a rank's context-parallel group gives it. Documents stay complete: which
    tokens attend to which is a question of the complete sequence.
    """
    return {name: share.of_sequences(t) if name in BY_TOKEN else t for name, t in batch.items()}


def run_micro_batches(
    setup: TrainSetup,
    plan: Plan,
    batches: Sequence[Batch],
    contexts: Sequence[ForwardContext],
    take_losses: LossSink,
    take_divergences: LossSink | None = None,
) -> Tensor | None:
    """Runs a plan over micro-batches and returns their routing, summed.

    Args:
        batches: complete sequences, of which all ranks of a context-parallel group have the same.
        take_divergences: where given, the set-up's teacher reads them too, and this takes the masked divergence kl_T of the
            model's predictions from the teacher's; its scalar is added to the other.

    Returns:
        A row for each MoE layer as the model's `statistics` say, zero for those of other stages; None for a dense model.
    """
    model, rows = setup.model, None
    fuses_loss = setup.config.training.fused_linear_cross_entropy and take_divergences is None
    contexts = [replace(context, fuses_loss=fuses_loss) for context in contexts]
    teacher = setup.teacher if take_divergences is not None else None
    if model.num_moe_layers:
        rows = model.statistics.zeros(model.num_moe_layers, setup.parallel.device)

    def forward(chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
        batch, stage = own_part(batches[micro_batch], setup.parallel.token_share), model.chunks[chunk]
        x = taught_x = batch["tokens"] if x is None else x
        if teacher is not None and not stage.is_first:
            x, taught_x = teacher.unpack(x, setup.local_tokens(contexts[micro_batch].batch_size))
        packed = (batch.get("position_ids"), batch.get("document_ids"))
        y, all_stats = model(x, contexts[micro_batch], *packed, chunk=chunk)
        taught_y = (
            None if teacher is None else teacher.forward(taught_x, contexts[micro_batch].batch_size, *packed, chunk)
        )
        for stats in all_stats:
            assert rows is not None
            model.statistics.add(rows, stats)
        if not stage.is_last:
            return y if teacher is None or taught_y is None else teacher.pack(y, taught_y)
        mask_T = batch["loss_mask"].flatten()
        loss = take_losses(batch, model.loss(y, batch["labels"], fuses_loss) * mask_T)
        if teacher is None or taught_y is None or take_divergences is None:
            return loss
        return loss + take_divergences(batch, teacher.divergence(y, taught_y) * mask_T)

    first = contexts[0] if contexts else ForwardContext(batch_size=1)
    run_plan(plan, setup.pipeline, forward, setup.boundary(first.batch_size, first.training, teacher is not None))
    return rows
