"""Finding where a number first stopped being one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import NonFiniteLossError
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.training.micro_batches import Batch, run_micro_batches
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import StepResult, micro_batch_context


def raise_non_finite(setup: TrainSetup, state: TrainState, batches: Sequence[Batch], result: StepResult) -> None:
    """Raises NonFiniteLossError naming step, part of the model and rank; all ranks call it together.

    The forward passes are run again with every layer watched. If all are finite, the backward pass was at fault, and
    the parameters whose gradients are not finite are named.
    """
    world = setup.parallel.world
    reports = world.all_gather_object(_first_in_forward(setup, state, batches))
    if not any(reports):
        reports = world.all_gather_object(_first_gradient(setup))
    ranked = sorted((*report, rank) for rank, report in enumerate(reports) if report is not None)
    found = "no rank finds it again in a second pass"
    if ranked:
        micro_batch, _, _, where, rank = ranked[0]
        found = f"first seen in {where} on rank {rank}" + (f", micro-batch {micro_batch}" if micro_batch >= 0 else "")
    raise NonFiniteLossError(
        f"Iteration {state.iteration + 1}: loss {result.lm_loss}, gradient norm {result.grad_norm}; {found}. "
        f"No weight was changed. {newest_in_words(setup.config.checkpoint.save)} A lower --lr, more warm-up or --clip-grad may help; "
        "so may looking at the data of this step.",
        collective=True,
    )


#: Micro-batch, part of the model, 0 where the rank's own weights are at fault (1 where it may have got it from others), name.
Finding = tuple[int, int, int, str]


def _first_in_forward(setup: TrainSetup, state: TrainState, batches: Sequence[Batch]) -> Finding | None:
    """Returns the first non-finite output on this rank."""
    seen: list[Finding] = []
    current = [0]

    def note(order: int, name: str, module: nn.Module) -> None:
        weights_are_finite = all(_is_finite(p) for p in module.parameters())
        seen.append((current[0], order, int(weights_are_finite), name))

    def watch(order: int, name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            if not _is_finite(x):
                note(order, name, module)

        return module.register_forward_hook(hook)

    def take_losses(_batch: Batch, losses_T: Tensor) -> Tensor:
        if not _is_finite(losses_T):
            note(setup.config.model.num_layers + 1, "the output layer", setup.model.chunks[-1].final_norm)
        return losses_T.sum()

    handles = []
    for chunk in setup.model.chunks:
        handles += [watch(0, "the embedding", chunk.embedding)] if chunk.is_first else []
        handles += [watch(1 + int(index), f"layer {index}", layer) for index, layer in chunk.layers.items()]
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                current[0] = number
                context = micro_batch_context(setup, state, number)
                plan = forward_plan(setup.pipeline.num_chunks, 1)
                run_micro_batches(setup, plan, [batch], [context], take_losses)
    finally:
        for handle in handles:
            handle.remove()
    return min(seen, default=None)


def _first_gradient(setup: TrainSetup) -> Finding | None:
    bad = [name for name, p in setup.buffers.parameters.items() if not _is_finite(p.main_grad)]  # type: ignore[attr-defined]
    return (-1, 0, 0, f"the gradient of {bad[-1]}") if bad else None


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
