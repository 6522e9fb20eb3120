"""What programs share that load a model: under torchrun it is spread over the ranks, whichever layout saved it."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable

import torch.distributed as dist

from megatron_samoe.cli.arguments import Options, Words, adder
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.log import configure_logging
from megatron_samoe.parallel_state import ParallelState, backend
from megatron_samoe.runtime.load import LoadedModel, load_model
from megatron_samoe.runtime.ranks import join_ranks

#: Options that say over how many ranks a model is spread; ParallelConfig has the same fields.
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def add_model_arguments(group: argparse._ActionsContainer, required: bool = True) -> None:
    """Adds the flags that name a checkpoint."""
    add = adder(group)
    add("--load", str, "folder of a run or of checkpoints, saved by any layout", required=required)
    add("--tokenizer-model", str, "in place of the tokenizer that the checkpoint carries", metavar="FILE")
    add("--ckpt-step", int, "iteration; the newest if not given", metavar="N")


def add_layout_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the flags that spread a model over ranks."""
    for size in SIZES:
        adder(group)(f"--{size.replace('_', '-')}", 1, metavar="N")


def layout_of(options: Options) -> ParallelConfig:
    """Returns the layout that was asked for."""
    return ParallelConfig(**{size: getattr(options, size) for size in SIZES})


def join(options: Options, num_threads: int | None = None) -> ParallelState:
    """Joins the torchrun job, if this is one; ConfigError for a number of threads that no process has."""
    if num_threads is not None and num_threads < 1:
        raise ConfigError("--num-threads", num_threads, "must be 1 or more")
    return join_ranks(layout_of(options), num_threads)


def load(options: Options, parallel: ParallelState, combine: bool = True, folder: str | None = None) -> LoadedModel:
    """Returns the model that `add_model_arguments` names, or that of another folder."""
    return load_model(
        options.load if folder is None else folder, parallel, layout_of(options), ckpt_step=options.ckpt_step, combine=combine,
        tokenizer_model=options.tokenizer_model,
    )  # fmt: skip


def this_rank() -> int:
    """Returns the rank that torchrun gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def rank_program(command: Callable[[Words], int | None]) -> Callable[..., int]:
    """Returns a program's main that gives the exit status: an error that all ranks meet is shown by the first alone."""

    @functools.wraps(command)
    def main(words: Words = None) -> int:
        configure_logging(this_rank())
        try:
            return command(words) or 0
        except MegatronSamoeError as error:
            if this_rank() == 0 or not error.collective:
                print(f"error: {error}", file=sys.stderr, flush=True)
            return error.exit_status
        finally:
            # Else gloo's threads may be running when the interpreter ends, which aborts the process.
            if dist.is_initialized() and sys.exc_info()[0] is None:
                backend.leave_distributed()

    return main
