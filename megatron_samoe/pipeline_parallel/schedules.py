"""The execution of a schedule's plan over any stage functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.pipeline_parallel.p2p_communication import Direction, PipelineChannel, TensorSpec
from megatron_samoe.pipeline_parallel.schedule_plan import Action, Plan


class StageFunction(Protocol):
    """A forward pass of one of the rank's chunks."""

    def __call__(self, chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
        """Returns the input of the next virtual stage, or from the last stage a scalar, the loss to differentiate.

        Args:
            x: output of the virtual stage before; None for the first.
        """
        ...


@dataclass(frozen=True)
class Pipeline:
    """This rank's part of the pipeline.

    Attributes:
        channel: None in a pipeline of one rank, which may still have several chunks.
    """

    rank: int
    size: int
    num_chunks: int
    channel: PipelineChannel | None

    def virtual_stage(self, chunk: int) -> int:
        """Returns the index of a chunk among all virtual stages."""
        return chunk * self.size + self.rank

    def receives(self, action: Action) -> bool:
        """Returns whether an action needs a tensor from another stage."""
        stage = self.virtual_stage(action.chunk)
        return stage > 0 if action.kind == "F" else stage < self.size * self.num_chunks - 1

    def incoming(self, action: Action) -> tuple[Direction, str]:
        """Returns (direction, name) of the tensor that an action waits for."""
        return self._name(action, 0)

    def outgoing(self, action: Action) -> tuple[Direction, str]:
        """Returns (direction, name) of the tensor that an action sends."""
        return self._name(action, 1)

    def _name(self, action: Action, steps: int) -> tuple[Direction, str]:
        stage, micro_batch = self.virtual_stage(action.chunk), action.micro_batch
        if action.kind == "F":
            return "forward", f"activation of micro-batch {micro_batch} for virtual stage {stage + steps}"
        return "backward", f"gradient of micro-batch {micro_batch} for virtual stage {stage - steps}"


def run_plan(plan: Plan, pipeline: Pipeline, forward: StageFunction, spec: TensorSpec) -> None:
    """Runs a rank's passes in the plan's order, with gradients if the plan has backward passes.

    Receives are posted one action ahead, and sends run while the next action computes.

    Args:
        spec: of the tensors that stages exchange.

    Raises:
        CommunicationError: another stage did not answer in time.
    """
    channel = pipeline.channel
    if channel is None:
        _run_alone(plan, pipeline, forward)
        return
    with_gradients = any(action.kind == "B" for action in plan)
    gradient_spec = spec.of_gradients()
    num_rows, is_cut = gradient_spec.shape[0], spec.rows_without_gradient > 0
    held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    for action, upcoming in zip(plan, [*plan[1:], None], strict=True):
        received = None
        for coming in (action, upcoming):
            if coming is not None and pipeline.receives(coming):
                direction, what = pipeline.incoming(coming)
                channel.post_receive(spec if coming.kind == "F" else gradient_spec, direction, what)
        if pipeline.receives(action):
            received = channel.take(pipeline.incoming(action)[1])
        key = (action.chunk, action.micro_batch)
        is_last = pipeline.virtual_stage(action.chunk) == pipeline.size * pipeline.num_chunks - 1
        if action.kind == "F":
            if received is not None and with_gradients:
                received.requires_grad_()
            output = forward(action.chunk, action.micro_batch, received)
            if with_gradients:
                held[key] = (received, output)
            if not is_last:
                direction, what = pipeline.outgoing(action)
                channel.send(output.detach(), direction, what)
        else:
            x, output = held.pop(key)
            torch.autograd.backward(output[:num_rows] if is_cut and not is_last else output, received)
            if x is not None:
                assert x.grad is not None
                direction, what = pipeline.outgoing(action)
                channel.send(x.grad[:num_rows], direction, what)
    channel.finish()


def _run_alone(plan: Plan, pipeline: Pipeline, forward: StageFunction) -> None:
    """Runs each micro-batch through all chunks and straight back, on one rank without communication."""
    with_gradients = any(action.kind == "B" for action in plan)
    for micro_batch in dict.fromkeys(action.micro_batch for action in plan):
        x: Tensor | None = None
        for chunk in range(pipeline.num_chunks):
            x = forward(chunk, micro_batch, x)
        if with_gradients:
            assert x is not None
            x.backward()
