"""Loaded tiny models without a checkpoint, and the training forward's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.kv_cache import PageTable, Span, StepBatch, make_batch
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.pipeline_parallel.schedules import Pipeline
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.tiny import tiny_config

VOCAB = 257  # of the byte tokenizer


def loaded_tiny(layout: str, mixing: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> LoadedModel:
    """Returns a model of random weights over bytes; `mixing` lets its layers combine several banks.

    The weights are larger than in training, so that an expert or position that is off shows in the logits.
    """
    config = tiny_config(layout, **{"seq_length": 48, "init_method_std": 0.2, **options})
    model = build_model(config, VOCAB, single_process_state(), dtype)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if name.endswith("candidates"):  # some closed, some on their way
            p.data[1::3] *= 0.5
            p.data[2::4] = 0.0
        elif p.dim() <= 1 or "b1" in name or "b2" in name or name.endswith("bias"):
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
        if mixing and name.endswith("moe.experts.coefficients"):
            p.data += 0.5 * torch.randn(p.shape, generator=generator)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model.begin_step()
    tokenizer = build_tokenizer("ByteTokenizer", None, None, None)
    return LoadedModel(model, tokenizer, config, Path("."), Pipeline(0, 1, 1, None))


@torch.no_grad()
def forward_logits(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """Returns the training forward's logits after every token."""
    logits, _ = loaded.model(torch.tensor(ids)[None], ForwardContext(batch_size=1))
    return logits[:, :VOCAB].float()


def step_logits(runner: Any, pages: PageTable, parts: list[tuple[int, int, list[int]]]) -> list[Tensor]:
    """Returns logits after every token of a step of (slot, first position, ids)."""
    spans = [Span(slot, first, len(ids)) for slot, first, ids in parts]
    tokens = [token for *_, ids in parts for token in ids]
    batch: StepBatch = make_batch(spans, tokens, pages.table, range(len(tokens)), runner.device)
    return list(runner.run(batch).clone().split([len(ids) for *_, ids in parts]))


def generated(engine: Engine, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[list[int]]:
    """Returns the tokens that an engine makes of prompts, the likeliest ones unless a temperature is given."""
    sampling = SamplingOptions(count, **{"temperature": 0.0, "seed": 5, "ignore_eod": True, **options})
    found: dict[int, list[int]] = {engine.submit(Request(p, sampling)): [] for p in prompts}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event.token_id)
    return list(found.values())
