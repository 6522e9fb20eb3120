"""The loading of a trained model from a checkpoint folder onto its ranks, ready to run."""

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
from megatron_samoe.datasets.carried_tokenizer import chat_of, with_carried
from megatron_samoe.datasets.chat_template import read_chat
from megatron_samoe.datasets.tokenizer import Tokenizer, tokenizer_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.models.rank_model import RankModel, build_model
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
    load: str,
    parallel: ParallelState,
    layout: ParallelConfig | None = None,
    ckpt_step: int | None = None,
    combine: bool = True,
    tokenizer_model: str | None = None,
) -> LoadedModel:
    """Returns the model of the newest checkpoint in a folder, in this rank's layout.

    Args:
        load: folder of a run, of checkpoints, or of one checkpoint.
        layout: of the ranks in `parallel`; one process if not given.
        ckpt_step: iteration to load in place of the newest.
        tokenizer_model: file of the tokenizer, in place of the one that the checkpoint carries or names.
        combine: combine a pool's experts, as the model's forward pass needs. False saves the memory of folded experts
            for an engine, which folds them itself or serves them on the fly or selected.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        DataError: the checkpoint carries no tokenizer, and the one of training is not where it was.
    """
    wanted = CheckpointConfig(load=load, ckpt_step=ckpt_step, exit_on_missing_checkpoint=True)
    directory = store.find_checkpoint(wanted, lambda d: store.damaged_files(d, parallel))
    assert directory is not None
    config = from_mapping(store.read_config(directory), str(directory / store.CONFIG))
    # Only the model's part of the saved configuration counts here, on this run's ranks.
    one_sequence = replace(config.training, micro_batch_size=1, global_batch_size=None)
    config = replace(config, parallel=layout or ParallelConfig(), training=one_sequence, checkpoint=CheckpointConfig())
    validate(config, parallel.world_size)
    tokenizer = _tokenizer(config.data, directory, tokenizer_model)
    reader = CheckpointReader(directory)  # refuses sizes that no tensor has, before a model has them
    if tokenizer_model is None:  # else the files beside that one count
        tokenizer.chat = read_chat(chat_of(reader.attachments), directory)
    train_state = store.read_train_state(directory, ("vocab_size",))
    store.refuse_parts(train_state, str(directory))
    vocab_size = train_state["vocab_size"]
    model = build_model(config, vocab_size, parallel)
    tensors = {n: sharded(p, tag_of(p).shard, parallel, tag_of(p).slice) for n, p in model.global_parameters().items()}
    store.load_checkpoint(directory, tensors, parallel)
    model.eval().requires_grad_(False)
    if combine:
        with torch.no_grad():
            model.begin_step()
    channel = open_channel(parallel, timedelta(minutes=config.parallel.distributed_timeout_minutes))
    pipeline = Pipeline(parallel.pp.rank, parallel.pp.size, len(model.chunks), channel)
    return LoadedModel(model, tokenizer, config, directory, pipeline)


def _tokenizer(data: DataConfig, directory: Path, given: str | None) -> Tokenizer:
    data = with_carried(data, directory)
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
            else " It was not saved with the checkpoint; --tokenizer-model says where it is now."
        )
        raise DataError(f"{error}{hint}") from None
