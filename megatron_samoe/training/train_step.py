"""One optimizer step: forward and backward over micro-batches, one reduction, one update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_samoe.distributed.finalize_model_grads import finalize_model_grads
from megatron_samoe.moe.candidates import votes_before
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.asynchronous import HostCopy
from megatron_samoe.optimizer.clip_grads import clip_factor, global_grad_norm
from megatron_samoe.optimizer.schedule import rate_of_step
from megatron_samoe.parallel_state.state import WaitClock
from megatron_samoe.pipeline_parallel.schedule_plan import make_plan
from megatron_samoe.tensor_parallel.random import SampleRandom
from megatron_samoe.training.micro_batches import Batch, run_micro_batches
from megatron_samoe.training.router_health import RouterHealth
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState


@dataclass(frozen=True)
class RoutingStats:
    """Routing of one global batch, per MoE layer (L) and expert (E).

    Attributes:
        counts_LE: tokens that chose each expert, before dropping; on the CPU.
        load_balance_loss: mean over layers of the balance loss, unweighted: 1 is perfect balance; None where the strategy reports
            no such sum.
        z_loss: mean over layers and tokens of the squared log-sum-exp of router logits.
        others: means over layers and tokens of what other routers and strategies report, by name.
    """

    counts_LE: Tensor
    load_balance_loss: float | None
    z_loss: float
    health: RouterHealth
    others: Mapping[str, list[float]]


def fractions(counts_LE: Tensor) -> Tensor:
    """Returns the share of a layer's routed tokens that each expert has, in fp32."""
    return (counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1)).float()


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank.

    Attributes:
        batch_size: sequences of the step over all ranks.
        grad_norm: before clipping.
        skipped: whether weights stayed as they were: fp16's overflow, or a spike with --skip-spikes.
        spike: what is wrong with the step, with --spike-window; None where nothing is.
        kl_loss: mean KL(teacher || student) per predicted token, at the temperature and unweighted; None without a teacher.
    """

    lm_loss: float
    grad_norm: float
    learning_rate: float
    num_loss_tokens: int
    routing: RoutingStats | None
    loss_scale: float
    batch_size: int
    skipped: bool = False
    spike: str | None = None
    kl_loss: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; an overflow that the loss scale handles counts as such."""
        return math.isfinite(self.lm_loss) and (self.skipped or math.isfinite(self.grad_norm))


def micro_batch_context(setup: TrainSetup, state: TrainState, number: int) -> ForwardContext:
    """Returns the context of this rank's micro-batch `number` of the next step."""
    size, dp = setup.config.training.micro_batch_size, setup.parallel.dp
    first = (number * dp.size + dp.rank) * size
    return ForwardContext(
        batch_size=size,
        training=True,
        tokens_per_step=setup.tokens_after(state.consumed_samples),
        gradient_scale=state.loss_scale.value,
        random=SampleRandom(setup.config.training.seed, state.iteration, tuple(range(first, first + size))),
    )


class StepSums:
    """The sums over the global batch of a step, on the device.

    Args:
        losses: sums over all predicted tokens, of the loss and, with a teacher, of the divergence from it.
        num_tokens: predicted tokens.
        rows: a row for each MoE layer as the model's `statistics` say; None for a dense model.
    """

    def __init__(self, losses: Tensor, num_tokens: Tensor, rows: Tensor | None):
        self._parts = [losses, num_tokens[None]] if rows is None else [losses, num_tokens[None], rows.flatten()]
        self.rows = rows

    def read(
        self, setup: TrainSetup, state: TrainState, *others: Tensor
    ) -> tuple[float, int, float | None, RoutingStats | None, list[float]]:
        """Waits for the device and returns what `compute_gradients` does, and the values of other scalars."""
        parts = [*self._parts, *(other.double().view(1) for other in others)]
        values = HostCopy(torch.cat(parts)).wait().split([len(part) for part in parts])
        losses, num_tokens = values[0].tolist(), max(int(values[1]), 1)
        routing = None if self.rows is None else _routing_stats(values[2].view_as(self.rows), setup, state)
        kl_loss = None if setup.teacher is None else losses[1] / num_tokens
        return losses[0] / num_tokens, num_tokens, kl_loss, routing, [float(v) for v in values[len(self._parts) :]]


def compute_gradients(
    setup: TrainSetup, state: TrainState, batches: Sequence[Batch], observe: Callable[[], None] | None = None
) -> tuple[float, int, float | None, RoutingStats | None]:
    """Leaves the global batch's gradients in the main gradients of all parameters, before any scaling or clipping.

    Args:
        batches: this rank's micro-batches of the step.
        observe: called after the last backward pass, before this rank's gradients are completed and reduced; nothing is
            reduced early in its step.

    Returns:
        The mean loss per predicted token, the number of these tokens, their mean divergence from a teacher's predictions,
        and the routing.
    """
    return accumulate_gradients(setup, state, batches, observe).read(setup, state)[:4]


def accumulate_gradients(
    setup: TrainSetup, state: TrainState, batches: Sequence[Batch], observe: Callable[[], None] | None = None
) -> StepSums:
    """As `compute_gradients`, without a wait for the device."""
    model, scale = setup.model, state.loss_scale.value
    num_tokens = _num_loss_tokens(setup, state, batches)
    setup.buffers.zero(len(batches), overlap=observe is None)
    model.begin_step()
    teacher = setup.teacher
    weights = (1.0,) if teacher is None else (1.0, teacher.weight)
    loss_sums = torch.zeros(len(weights), dtype=torch.float64, device=setup.parallel.device)

    def take(which: int, _batch: Batch, losses_T: Tensor) -> Tensor:
        loss = losses_T.sum()
        loss_sums[which] += loss.detach()
        return loss * (weights[which] * scale / num_tokens).to(loss.dtype)

    pipeline = setup.pipeline
    schedule = setup.config.parallel.pipeline_schedule
    plan = make_plan(schedule, pipeline.size, pipeline.rank, pipeline.num_chunks, len(batches))
    contexts = [micro_batch_context(setup, state, number) for number in range(len(batches))]
    device = setup.parallel.device
    with named_range("forward and backward", device):
        rows = run_micro_batches(setup, plan, batches, contexts, *(partial(take, i) for i in range(len(weights))))
    if observe is not None:
        observe()
    with named_range("reduce gradients", device):
        finalize_model_grads(model, setup.buffers, scale)
    if rows is not None and setup.parallel.cp.rank:
        rows.zero_()  # routing is of complete sequences, the same on all their ranks
    sums = loss_sums if rows is None else torch.cat((loss_sums, rows.flatten()))
    sums = setup.parallel.pp.all_reduce(setup.parallel.dp_cp.all_reduce(sums))
    rows = None if rows is None else sums[len(weights) :].view_as(rows)
    return StepSums(sums[: len(weights)], num_tokens, rows)


def train_step(
    setup: TrainSetup,
    state: TrainState,
    batches: Sequence[Batch],
    observe: Callable[[], None] | None = None,
    pre_optim_step: Callable[[float], None] | None = None,
) -> tuple[StepResult, TrainState]:
    """Runs one optimizer step and returns what happened and the state after it.

    If the result is not finite no parameter has changed.

    Args:
        observe: as in `compute_gradients`.
        pre_optim_step: called with the gradient norm when gradients are complete, where the optimizer will use them.
    """
    sums = accumulate_gradients(setup, state, batches, observe)
    norm_of_all = global_grad_norm(setup.optimizer.pieces.values(), setup.parallel)
    # The step's one wait for the device.
    lm_loss, num_tokens, kl_loss, routing, (norm,) = sums.read(setup, state, norm_of_all)
    if setup.parallel.ep.exchange is not None:
        setup.parallel.ep.exchange.check()
    counts_LE = None if sums.rows is None else setup.model.statistics.named(sums.rows)["counts"]
    optimizer = setup.config.optimizer
    training, batch_size = setup.config.training, setup.batch_size_after(state.consumed_samples)
    lr = rate_of_step(optimizer, training, state.iteration, state.consumed_samples, batch_size)
    overflow = training.fp16 and math.isfinite(lm_loss) and not math.isfinite(norm)
    spike = None if overflow else state.spikes.problem(lm_loss, norm, training)
    skipped = overflow or (spike is not None and training.skip_spikes)
    result = StepResult(
        lm_loss, norm, lr, num_tokens, routing, state.loss_scale.value, batch_size, skipped, spike, kl_loss
    )
    if not result.is_finite:
        return result, state
    shares_LE, before = _shares(counts_LE, setup, state)
    if not skipped:
        if pre_optim_step is not None:
            pre_optim_step(norm)
        with named_range("optimizer", setup.parallel.device):
            setup.optimizer.step(lr, clip_factor(norm, optimizer.clip_grad))
        if counts_LE is not None and shares_LE is not None:
            in_step = setup.tokens_after(state.consumed_samples)
            votes_LE = shares_LE if before else counts_LE
            order_E = setup.model.after_step(counts_LE, state.iteration + 1, in_step, votes_LE)
            if order_E is not None:
                model = setup.model
                setup.optimizer.reorder_experts(model.global_parameters(), model.expert_dims(), order_E)
                shares_LE = shares_LE[:, order_E]
    return result, replace(
        state,
        iteration=state.iteration + 1,
        consumed_samples=state.consumed_samples + batch_size,
        consumed_tokens=state.consumed_tokens + setup.tokens_after(state.consumed_samples),
        loss_scale=state.loss_scale.after(overflow),
        spikes=state.spikes.after(lm_loss, norm, training),
        expert_fractions_LE=shares_LE,
    )


def _shares(counts_LE: Tensor | None, setup: TrainSetup, state: TrainState) -> tuple[Tensor | None, int]:
    """Returns each expert's share of its layer's tokens, in a step that votes the mean over the voters so far, and how many
    voted before it."""
    if counts_LE is None:
        return None, 0
    shares_LE, mean_LE = fractions(counts_LE), state.expert_fractions_LE
    before = 0 if mean_LE is None else votes_before(setup.config.moe, state.iteration + 1)
    return (shares_LE if mean_LE is None or not before else mean_LE + (shares_LE - mean_LE) / (before + 1)), before


def _num_loss_tokens(setup: TrainSetup, state: TrainState, batches: Sequence[Batch]) -> Tensor:
    """Returns the predicted tokens of the global batch, at least 1, in fp64 on the device."""
    if not setup.config.data.eod_mask_loss:
        number = setup.tokens_after(state.consumed_samples)
        return torch.full((), number, dtype=torch.float64, device=setup.parallel.device)
    count = torch.stack([batch["loss_mask"].double().sum() for batch in batches]).sum()
    return setup.parallel.dp.all_reduce(count).clamp_min(1)


def _routing_stats(rows: Tensor, setup: TrainSetup, state: TrainState) -> RoutingStats:
    sums, tokens = setup.model.statistics.named(rows), setup.tokens_after(state.consumed_samples)
    counts_LE = sums.pop("counts")
    z_sum_L, dropped_L = (sums.pop(name)[:, 0] for name in ("z_sum", "dropped"))
    balance_L1 = sums.pop("balance", None)
    counts = setup.model.balanced_counts(counts_LE)
    return RoutingStats(
        counts_LE,
        load_balance_loss=None
        if balance_L1 is None
        else balance_L1.mean().item() / setup.batch_size_after(state.consumed_samples),
        z_loss=(z_sum_L / tokens).mean().item(),
        health=RouterHealth.of(counts, tokens, dropped_L.sum().item()),
        others={name: (values / tokens).mean(0).tolist() for name, values in sums.items()},
    )


@contextlib.contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """Names what happens within it, for torch's profiler and, on CUDA, as an NVTX range for Nsight Systems."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.nvtx.range(name))
        stack.enter_context(torch.profiler.record_function(name))
        yield


class StepTime(NamedTuple):
    """Seconds of a step, how much of them this rank did not spend waiting for others, and tokens of a second."""

    step_s: float
    own_s: float
    tokens_per_s: float


@dataclass
class Stopwatch:
    """Time, steps and tokens since the last record, evaluation and saving not counted.

    Args:
        waits: of this rank's groups.
    """

    waits: WaitClock
    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    tokens: int = 0

    def begin(self) -> None:
        """Starts a step."""
        self.started, self.waited_before = time.perf_counter(), self.waits.seconds

    def end(self, tokens: int) -> None:
        """Ends a step; `tokens` are those of all ranks."""
        self.seconds += time.perf_counter() - self.started
        self.waited += self.waits.seconds - self.waited_before
        self.steps += 1
        self.tokens += tokens

    def take(self) -> StepTime:
        """Returns the mean of the steps since the last call and starts anew."""
        steps = max(self.steps, 1)
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        mean = StepTime(self.seconds / steps, (self.seconds - self.waited) / steps, rate)
        self.seconds, self.waited, self.steps, self.tokens = 0.0, 0.0, 0, 0
        return mean
