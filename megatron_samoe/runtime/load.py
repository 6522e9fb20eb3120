"""The loading of a trained model from an opened folder onto its ranks, ready to run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.datasets.carried_tokenizer import chat_of
from megatron_samoe.datasets.chat_template import read_chat
from megatron_samoe.datasets.tokenizer import Tokenizer, tokenizer_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.errors import CheckpointError, ConfigError, DataError
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.pipeline_parallel.p2p_communication import open_channel
from megatron_samoe.pipeline_parallel.schedules import Pipeline


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, the tokenizer it was trained with, and its checkpoint."""

    model: RankModel
    tokenizer: Tokenizer
    config: PretrainConfig
    directory: Path
    pipeline: Pipeline


def load_model(
    opened: Opened,
    parallel: ParallelState,
    layout: ParallelConfig | None = None,
    combine: bool = True,
    tokenizer_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Returns the model of a folder that was opened, in this rank's layout; all ranks call it together.

    Args:
        layout: of the ranks in `parallel`; one process if not given.
        combine: combine a pool's experts, as the model's forward pass needs. False saves the memory of folded experts
            for an engine, which folds them itself or serves them on the fly or selected.
        tokenizer_model: file of the tokenizer, instead of the one that the folder carries or names.
        dtype: of the weights; as they are stored if not given.

    Raises:
        CheckpointError: a file is damaged.
        DataError: the folder carries no tokenizer, and the one of training is not where it was.
    """
    directory = opened.directory
    config = from_mapping(opened.tensors.config, f"the configuration of {directory}")
    # Only the model's part of the saved configuration counts here, on this run's ranks.
    training = replace(config.training, micro_batch_size=1, global_batch_size=None)
    if dtype is not None:
        training = replace(training, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    config = replace(config, parallel=layout or ParallelConfig(), training=training, checkpoint=CheckpointConfig())
    validate(config, parallel.world_size)
    tokenizer = _tokenizer(opened.data, tokenizer_model)
    if tokenizer_model is None:  # else the files next to that one count
        tokenizer.chat = read_chat(chat_of(opened.model.attachments), directory)
    train_state = opened.tensors.train_state
    if "vocab_size" not in train_state:
        raise CheckpointError(f"{directory} does not say its vocab_size.", collective=True)
    store.refuse_parts(train_state, str(directory))
    # Values that are overwritten need not be drawn, nor their spread be found out.
    unscaled = replace(config, moe=replace(config.moe, moe_scale_output_init=False))
    model = RankModel(unscaled, train_state["vocab_size"], parallel, compute_dtype(config))
    tensors = {n: sharded(p, tag_of(p).shard, parallel, tag_of(p).slice) for n, p in model.global_parameters().items()}
    opened.load_into(tensors, parallel)
    model.eval().requires_grad_(False)
    if combine:
        with torch.no_grad():
            model.begin_step()
    channel = open_channel(parallel, timedelta(minutes=config.parallel.distributed_timeout_minutes))
    pipeline = Pipeline(parallel.pp.rank, parallel.pp.size, len(model.chunks), channel)
    return LoadedModel(model, tokenizer, config, directory, pipeline)


def _tokenizer(data: DataConfig, given: str | None) -> Tokenizer:
    if given is not None:
        if data.tokenizer_model is None:
            raise ConfigError(
                "--tokenizer-model", given, f"has no use: the model's tokenizer is a {data.tokenizer_type}"
            )
        data = replace(data, tokenizer_model=given)
    try:
        return tokenizer_of(data)
    except DataError as error:
        hint = (
            ""
            if given is not None
            else " It was not saved with the model; --tokenizer-model (in Python tokenizer_model) says where it is now."
        )
        raise DataError(f"{error}{hint}") from None
