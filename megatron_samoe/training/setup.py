"""Everything that a run is made of, built once from its configuration."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_samoe.config.derived import batch_size_after, global_batch_size, num_micro_batches
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.errors import ConfigError, in_units
from megatron_samoe.log import logger
from megatron_samoe.models.blueprint import ModelParts
from megatron_samoe.models.rank_model import RankModel, build_model
from megatron_samoe.optimizer.mixed_precision import LossScale, MixedPrecisionOptimizer
from megatron_samoe.optimizer.param_groups import ParamRule, default_rules, refuse_idle_patterns
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.pipeline_parallel.p2p_communication import TensorSpec, open_channel
from megatron_samoe.pipeline_parallel.schedule_plan import MUCH_IDLE
from megatron_samoe.pipeline_parallel.schedules import Pipeline
from megatron_samoe.planning.accounting import count_parameters, idle_share
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.teacher import Teacher


@dataclass(frozen=True)
class Extensions:
    """Parts of a run from outside the package; see docs/extending.md.

    Attributes:
        parts: of the model.
        rules: makes the rules by which parameters change.
    """

    parts: ModelParts = field(default_factory=ModelParts)
    rules: Callable[[OptimizerConfig], tuple[ParamRule, ...]] = default_rules


@dataclass(frozen=True)
class TrainSetup:
    """One rank's model with what trains it.

    Attributes:
        attachments: files that checkpoints carry, by their path in a checkpoint.
        teacher: whose predictions the next step learns, if there is one.
    """

    config: PretrainConfig
    parallel: ParallelState
    model: RankModel
    buffers: GradBuffers
    optimizer: MixedPrecisionOptimizer
    pipeline: Pipeline
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    teacher: Teacher | None = None

    @property
    def batch_size(self) -> int:
        """Sequences of one optimizer step over all ranks, once --rampup-batch-size is over."""
        return global_batch_size(self.config, self.parallel.world_size)

    def batch_size_after(self, consumed_samples: int) -> int:
        """Returns the sequences, over all ranks, of the optimizer step after a number of steps."""
        return batch_size_after(self.config, self.parallel.world_size, consumed_samples)

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimizer step of `batch_size` on each rank."""
        return num_micro_batches(self.config, self.parallel.world_size)

    def boundary(self, batch_size: int, training: bool = False, taught: bool = False) -> TensorSpec:
        """Returns what pipeline stages hand over for a micro-batch of `batch_size` sequences.

        Args:
            taught: whether the teacher's activations travel with the student's.
        """
        hidden, dtype, loads = self.config.model.hidden_size, self.model.dtype, self.model.set_loads
        tokens = self.local_tokens(batch_size)
        rows = loads.num_rows(batch_size, hidden, dtype) if training and loads is not None else 0
        rows_without_gradient = self.teacher.num_rows(tokens, hidden) if taught and self.teacher is not None else 0
        return TensorSpec(
            (tokens + rows + rows_without_gradient, hidden), dtype, self.parallel.device, rows_without_gradient
        )

    def local_tokens(self, batch_size: int) -> int:
        """Returns the tokens of a micro-batch that this rank holds between layers."""
        return batch_size * self.config.model.seq_length // self.parallel.token_share.num_shares

    def tokens_after(self, consumed_samples: int) -> int:
        """Returns the tokens, over all ranks, of the optimizer step after a number of samples."""
        return self.batch_size_after(consumed_samples) * self.config.model.seq_length


def build_setup(
    config: PretrainConfig,
    vocab_size: int,
    parallel: ParallelState,
    dtype: torch.dtype | None = None,
    extensions: Extensions | None = None,
) -> TrainSetup:
    """Returns model, gradient buffers and optimizer of this rank, with initial weights.

    Args:
        dtype: of weights and activations, if not the configured precision.
        extensions: what comes from outside the package.
    """
    extensions = extensions or Extensions()
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    model = build_model(config, vocab_size, parallel, dtype, extensions.parts)
    layout = config.parallel
    buffers = GradBuffers(
        model.global_parameters(),
        parallel,
        is_sharded=layout.use_distributed_optimizer,
        overlap=layout.overlap_grad_reduce,
        bucket_size=layout.ddp_bucket_size,
    )
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    pp = parallel.pp
    pipeline = Pipeline(pp.rank, pp.size, len(model.chunks), open_channel(parallel, timeout))
    refuse_idle_patterns(buffers.parameters, config.optimizer, parallel)
    optimizer = MixedPrecisionOptimizer(buffers, config.optimizer, parallel, extensions.rules(config.optimizer))
    return TrainSetup(config, parallel, model, buffers, optimizer, pipeline)


def initial_state(setup: TrainSetup) -> TrainState:
    """Returns the state of a run that has not begun: experts count as evenly loaded."""
    fractions = None
    if setup.model.num_moe_layers:
        most = max(setup.model.num_experts)
        rows = [[1 / n] * n + [0.0] * (most - n) for n in setup.model.num_experts]
        fractions = torch.tensor(rows, dtype=torch.float32, device=setup.parallel.device)
    return TrainState(0, 0, 0, LossScale.of(setup.config.training), fractions)


@contextlib.contextmanager
def naming_memory(config: PretrainConfig, vocab_size: int, parallel: ParallelState) -> Iterator[None]:
    """Says what a model needs that this rank could not allocate.

    Raises:
        ConfigError: the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        needed = rank_memory(config, vocab_size, parallel.world_size, parallel.rank).total
        raise ConfigError(
            "--hidden-size and others",
            config.model.hidden_size,
            f"the model does not fit in the memory of rank {parallel.rank}, which needs {in_units(needed, 'B')}. More tensor, "
            "pipeline or expert parallelism, --use-distributed-optimizer or a smaller model need less.",
        ) from error


def describe(setup: TrainSetup) -> None:
    """Logs what is trained on how many ranks, and what a reader of the configuration may not expect of it."""
    config, parallel = setup.config, setup.parallel
    count, grid = count_parameters(config, setup.model.vocab_size), parallel.grid
    logger.info(
        f"{config.moe.expert_layout} model: {count.total:,} parameters, {count.expert:,} of them expert, "
        f"{count.active:,} active per token; {grid.world_size} ranks on {parallel.device.type}: tensor {grid.tp}, "
        + (f"context {grid.cp}, " if grid.cp > 1 else "")
        + f"pipeline {grid.pp}, expert {grid.ep} (x tensor {grid.etp}), data {grid.dp}{_transport(parallel)}"
    )
    idle = idle_share(config, grid.world_size)
    if idle > MUCH_IDLE:
        logger.info(
            f"the pipeline is idle for {idle:.0%} of a step while it fills and drains: more micro-batches, virtual stages or "
            "fewer stages idle less"
        )
    if config.moe.moe_router_load_balancing_type == "aux_loss" and config.moe.moe_aux_loss_group_size is None:
        logger.info(
            "aux_loss without --moe-aux-loss-group-size balances within each sequence, as seq_aux_loss does (versions before "
            "0.2 weighed it by the loads of the step before, which made routers swing)"
        )


def _transport(parallel: ParallelState) -> str:
    """Returns through what ranks talk."""
    if parallel.world_size == 1:
        return ""
    backend_name = dist.get_backend()
    interface = os.environ.get(f"{backend_name.upper()}_SOCKET_IFNAME")
    over = f", over {backend_name}" + (f" on interface {interface}" if interface else "")
    exchange = parallel.ep.exchange
    return over if exchange is None else f"{over}; tokens travel through {getattr(exchange, 'transport', backend_name)}"
