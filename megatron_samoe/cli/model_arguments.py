"""The options of programs that load a model: under torchrun it is spread over the ranks, whichever layout saved it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Annotated

import torch.distributed as dist
import tyro

from megatron_samoe.cli.program import Commands, Count, Number, Program, Words, main_of, read
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.convert.opener import load_from
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.inference.serving import Precision, Serving
from megatron_samoe.log import configure_logging
from megatron_samoe.parallel_state import ParallelState, backend, launcher
from megatron_samoe.runtime.load import LoadedModel, load_model
from megatron_samoe.runtime.ranks import join_ranks


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """Over how many ranks a model is spread; ParallelConfig has the same fields."""

    tensor_model_parallel_size: Number = 1
    pipeline_model_parallel_size: Number = 1
    expert_model_parallel_size: Number = 1

    def layout(self) -> ParallelConfig:
        """Returns the layout that was asked for."""
        return ParallelConfig(**{f.name: getattr(self, f.name) for f in fields(LayoutOptions)})


@dataclass(frozen=True, kw_only=True)
class _CheckpointOptions:
    load: str
    """folder of a run, of checkpoints saved by any layout, or of another program's model"""
    tokenizer_model: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """replaces the tokenizer that the checkpoint carries"""
    ckpt_step: Count = None
    """iteration; the newest if not given"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LayoutOptions, _CheckpointOptions):
    """A checkpoint, and the ranks over which its model is spread."""

    def join(self, num_threads: int | None = None) -> ParallelState:
        """Joins the torchrun job, if this is one; ConfigError for a number of threads that no process has."""
        if num_threads is not None and num_threads < 1:
            raise ConfigError("--num-threads", num_threads, "must be 1 or more")
        return join_ranks(self.layout(), num_threads)

    def loaded(
        self, parallel: ParallelState, folder: str | None = None, step: int | None = None, combine: bool = True
    ) -> LoadedModel:
        """Returns the model of --load at --ckpt-step, or that of another folder at an iteration."""
        if folder is None:
            folder, step = self.load, self.ckpt_step
        tokenizer_model = self.tokenizer_model if folder == self.load else None

        def load(opened: Opened) -> LoadedModel:
            return load_model(opened, parallel, self.layout(), combine, tokenizer_model)

        return load_from(folder, load, parallel, step, LoadWords())


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How text is made."""

    serving: Serving = "auto"
    """how the experts of a shared pool are kept"""
    dtype: Precision | None = None
    """of weights; the checkpoint's if not given"""
    cache_experts: Count = None
    """experts combined on the fly that are kept; those of two tokens if not given"""
    weights_folder: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """keep weights in a file there, which Linux may drop from memory and read again; so they may be larger than memory while
    text is made"""
    max_batch: Number = 8
    """texts made at the same time"""
    max_tokens: Count = None
    """tokens that the key-value cache holds; enough for --max-batch full contexts if not given"""
    max_step_tokens: Number = 512
    """most tokens of one step"""


def rank_program(command: Commands) -> Program:
    """Returns the main of a command that ranks run together: an error of all is shown only by the first."""

    def main(words: Words = None) -> int:
        configure_logging(launcher.rank())
        try:
            return read(command, words).run() or 0
        except MegatronSamoeError as error:
            if launcher.rank() == 0 or not error.collective:
                print(f"error: {error}", file=sys.stderr, flush=True)
            return error.exit_status
        finally:
            # Else gloo's threads may be running when the interpreter ends, which aborts the process.
            if dist.is_initialized() and sys.exc_info()[0] is None:
                backend.leave_distributed()

    return main_of(command, main)
