"""Untrained models whose predictions differ much, and the plainest way to run them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.pipeline_parallel.schedules import Pipeline
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.tiny import tiny_config


@functools.cache
def loaded_model(experts: str = "samoe", style: str = "llama", **options: Any) -> LoadedModel:
    """Returns a model of bytes on one process."""
    config = tiny_config(experts, style=style, **options)
    model = build_model(config, ByteTokenizer.vocab_size, single_process_state())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than at the start of training, so that predictions differ much
                parameter.mul_(6)
        model.eval().begin_step()
    return LoadedModel(model, ByteTokenizer(), config, Path(), Pipeline(0, 1, 1, None))


def plain_log_probs(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Returns log-probabilities [S, V] of one sequence by itself."""
    with torch.no_grad():
        logits, _ = loaded.model(torch.tensor([tokens]), ForwardContext(batch_size=1), chunk=0)
    return logits.double().log_softmax(-1)
