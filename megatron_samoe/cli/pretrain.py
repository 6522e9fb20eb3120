"""Pretrain a GPT: `torchrun --nproc-per-node N -m megatron_samoe.cli.pretrain --config FILE.yaml [flags]`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.derived import data_parallel_size, with_train_iters
from megatron_samoe.config.elastic import fit_layout
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import DistillationConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.datasets.carried_tokenizer import read_files, with_carried
from megatron_samoe.datasets.tokenizer import Tokenizer, tokenizer_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.teacher import find_teacher
from megatron_samoe.errors import (
    CheckpointError,
    ConfigError,
    HostRefusedError,
    JobEndedError,
    MegatronSamoeError,
    ToldToLeaveError,
    in_units,
)
from megatron_samoe.log import configure_logging, logger
from megatron_samoe.parallel_state import backend, launcher
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.pipeline_parallel.schedule_plan import MUCH_IDLE
from megatron_samoe.planning.accounting import count_parameters, idle_share
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.runtime.kernels import choose_kernels, choose_products
from megatron_samoe.runtime.ranks import place_in, prepare_device
from megatron_samoe.training.batches import build_run_data
from megatron_samoe.training.hook import Hook
from megatron_samoe.training.hooks import default_hooks
from megatron_samoe.training.machine import alike_facts
from megatron_samoe.training.preflight import preflight
from megatron_samoe.training.setup import Extensions, build_setup
from megatron_samoe.training.state import BF16_PRODUCTS, CUDA_KERNELS, PLAIN_KEYS
from megatron_samoe.training.teacher import refuse_unfit
from megatron_samoe.training.trainer import Trainer

#: How long ranks that meet the same fault leave each other to say so.
SPEAKING_S = 2.0


def main(argv: Sequence[str] | None = None, extensions: Extensions | None = None, hooks: Sequence[Hook] = ()) -> int:
    """Runs the program and returns its exit status.

    Args:
        extensions: parts of the model and rules of the optimizer that come from outside the package.
        hooks: to be called after the configuration's own.
    """
    rank = launcher.rank()
    configure_logging(rank)
    config: PretrainConfig | None = None
    try:
        with backend.telling_other_hosts():
            config = parse_pretrain_args(
                sys.argv[1:] if argv is None else argv, _saved_config, quiet=launcher.local_rank() > 0
            )
            config, num_ranks = _fit_to_ranks(config)
        pretrain(config, num_ranks, extensions, hooks)
    except ToldToLeaveError as error:
        _tell_launcher(str(error))
        return error.exit_status
    except MegatronSamoeError as error:
        return _report(error, rank)
    except SystemExit as error:
        _let_first_speak(error)
        if error.code and not dist.is_initialized():  # the parser's, which has said why
            launcher.refuse_restart()
        return int(error.code or 0)
    except KeyboardInterrupt:
        if launcher.local_rank() == 0:
            left = "" if config is None else f": {store.newest_in_words(config.checkpoint.save)}"
            print(f"interrupted before the step was done{left}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            backend.leave_distributed()
    return 0


def pretrain(
    config: PretrainConfig, num_ranks: int, extensions: Extensions | None = None, hooks: Sequence[Hook] = ()
) -> None:
    """Trains as a legal configuration says, on so many ranks of this torchrun job, or in this process alone."""
    with backend.telling_other_hosts():
        device = prepare_device(config.parallel, config.training.num_threads, config.training.bf16)
        if device.type == "cpu":
            backend.keep_freed_memory()
        if config.training.fp16 and device.type != "cuda":
            raise ConfigError("--fp16", True, "needs a CUDA device; use --bf16 or fp32 on a CPU")
    facts = alike_facts(config, device) if launcher.world_size() > launcher.local_world_size() else {}
    meeting = backend.initialize_distributed(config.parallel, device, num_ranks, facts)
    with backend.shared_fate(meeting):
        if meeting is not None and not dist.is_initialized():
            meeting.stand_by()
            return
        _train(config, device, extensions, hooks)
        if meeting is not None and dist.get_rank() == 0:
            meeting.finish(num_ranks)


def _fit_to_ranks(config: PretrainConfig) -> tuple[PretrainConfig, int]:
    """Returns a legal configuration for the ranks that were started, and how many of them it uses."""
    started = launcher.world_size()
    if not config.parallel.elastic:
        validate(config, started)
        return config, started
    # Ranks may not know alike whether the teacher has left, so while its folder is there the layout is one for it too.
    folder, teacher = config.distillation.teacher, None
    if folder is not None and not config.training.skip_train:
        with contextlib.suppress(CheckpointError):
            teacher = find_teacher(folder).trained
    fitted, used = fit_layout(config, started, teacher)
    layout, wanted = fitted.parallel, config.parallel
    logger.info(
        f"elastic: {used} of {started} ranks work as tensor {layout.tensor_model_parallel_size}, "
        + (f"context {layout.context_parallel_size}, " if layout.context_parallel_size > 1 else "")
        + f"pipeline {layout.pipeline_model_parallel_size}, expert {layout.expert_model_parallel_size}, data "
        f"{data_parallel_size(fitted, used)}, micro-batches of {fitted.training.micro_batch_size}"
        + ("" if layout == wanted else " (another layout than was asked for)")
        + (f"; {started - used} stand by" if used < started else "")
    )
    return fitted, used


def _train(asked: PretrainConfig, device: torch.device, extensions: Extensions | None, hooks: Sequence[Hook]) -> None:
    parallel = place_in(asked.parallel, device, asked.moe.shares_experts)
    # A dying attempt may be saving, so ranks that look one after the other may see different things: rank 0's counts.
    begin = parallel.world.all_gather_object(_beginning(asked.checkpoint))[0]
    config = resolve(asked, parallel.world_size, begin)
    tokenizer, attachments, vocab_size = _tokenizer(config)
    choose_kernels(parallel, begin.kernels)
    choose_products(parallel, begin.products)
    is_taught = config.distillation.teaches_after(begin.iteration)
    planned = config if is_taught else replace(config, distillation=DistillationConfig())
    if is_taught and not config.training.skip_train and begin.iteration < config.training.train_iters:
        refuse_unfit(config, vocab_size, parallel.world_size, (extensions or Extensions()).parts)
    done, is_builder = (begin.iteration, begin.samples), launcher.local_rank() == 0
    run_data = build_run_data(config, tokenizer, parallel, is_builder, done)
    if config.parallel.preflight:
        preflight(planned, vocab_size, parallel)
    with _enough_memory(planned, vocab_size, parallel):
        setup = replace(build_setup(config, vocab_size, parallel, extensions=extensions), attachments=attachments)
    _describe(config, vocab_size, parallel)
    logger.info(run_data.summary())
    Trainer(setup, run_data, [*default_hooks(config), *hooks]).run()


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: the options of checkpoints, with what --pretrained-checkpoint means for this start.
        iteration, samples: that the run has behind it.
        kernels: CUDA kernels that it has used so far, and products how CPUs multiplied experts in bf16; None for a run that
            has none behind it.
    """

    checkpoint: CheckpointConfig
    iteration: int = 0
    samples: int = 0
    kernels: Sequence[str] | None = None
    products: str | None = None


def _beginning(options: CheckpointConfig) -> Beginning:
    """Returns where training will go on, as this rank sees it."""
    checkpoint = store.with_start(options)
    directory = None if checkpoint.finetune else store.find_checkpoint(checkpoint)
    if directory is None:
        return Beginning(checkpoint)
    saved = store.read_train_state(directory, PLAIN_KEYS)
    return Beginning(
        checkpoint, saved["iteration"], saved["consumed_samples"], saved.get(CUDA_KERNELS), saved.get(BF16_PRODUCTS)
    )


def resolve(asked: PretrainConfig, world_size: int, beginning: Beginning) -> PretrainConfig:
    """Returns what a run trains with: the steps that --train-samples makes from here, and the checkpoint to go on from."""
    config = with_train_iters(asked, world_size, (beginning.iteration, beginning.samples))
    return replace(config, checkpoint=beginning.checkpoint)


def _tokenizer(config: PretrainConfig) -> tuple[Tokenizer, dict[str, bytes], int]:
    """Returns the tokenizer, its files for checkpoints to carry, and the size of the vocabulary."""
    data = config.data
    directory = None if config.checkpoint.load is None else store.find_checkpoint(config.checkpoint)
    if directory is not None:
        data = with_carried(data, directory, only_missing=True)
        if data != config.data:
            logger.info(f"the tokenizer is the one that {directory} carries")
    tokenizer = tokenizer_of(data)
    vocab_size = data.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "--vocab-size", vocab_size, f"must be at least the tokenizer's {tokenizer.vocab_size} entries"
        )
    return tokenizer, read_files(data, directory), vocab_size


@contextlib.contextmanager
def _enough_memory(config: PretrainConfig, vocab_size: int, parallel: ParallelState) -> Iterator[None]:
    """Says what a model needs that this rank could not allocate."""
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


def _saved_config(config: PretrainConfig) -> Mapping[str, Any] | None:
    directory = store.find_checkpoint(store.with_start(config.checkpoint))
    return None if directory is None else store.read_config(directory)


def _describe(config: PretrainConfig, vocab_size: int, parallel: ParallelState) -> None:
    count, grid = count_parameters(config, vocab_size), parallel.grid
    logger.info(
        f"{config.moe.expert_layout} model: {count.total:,} parameters, {count.expert:,} of them expert, "
        f"{count.active:,} active per token; {grid.world_size} ranks on {parallel.device.type}: tensor {grid.tp}, "
        + (f"context {grid.cp}, " if grid.cp > 1 else "")
        + f"pipeline {grid.pp}, expert {grid.ep} (x tensor {grid.etp}), data {grid.dp}{_transport(parallel)}"
    )
    idle = idle_share(config, grid.world_size)
    if idle > MUCH_IDLE:
        logger.info(
            f"the pipeline stands idle for {idle:.0%} of a step while it fills and drains: more micro-batches, virtual stages or "
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


def _report(error: MegatronSamoeError, rank: int) -> int:
    """Says what went wrong, on the first rank of every host at least: each host has a log of its own."""
    _let_first_speak(error)
    is_first = launcher.local_rank() == 0
    if is_first or not error.collective:
        message = f"error{f' (rank {rank})' if rank else ''}: {error}"
        print(message, file=sys.stderr, flush=True)
        _tell_launcher(message)
    _let_other_hosts_speak(error)
    if error.permanent and (is_first or not error.collective):
        launcher.refuse_restart()
    return error.exit_status


def _tell_launcher(message: str) -> None:
    """Leaves the message where torchrun looks for it, so that its own report shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w") as file:
            details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            json.dump({"message": details}, file)


def _let_first_speak(error: BaseException) -> None:
    """Waits a little on other ranks of a host: a launcher stops them all when the first leaves, so one of many equal messages is
    shown. A host that the job goes on without leaves first, or the job would begin anew with it.
    """
    if launcher.local_rank() > 0 or isinstance(error, HostRefusedError):
        time.sleep(SPEAKING_S)


def _let_other_hosts_speak(error: MegatronSamoeError) -> None:
    """Waits a little where other hosts meet the same fault: this one's launcher may hold the store without which theirs end."""
    is_theirs = error.ends_job and (error.collective or isinstance(error, JobEndedError))
    if is_theirs and launcher.has_other_hosts():
        time.sleep(SPEAKING_S)


if __name__ == "__main__":
    sys.exit(main())
