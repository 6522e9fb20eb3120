"""Text that follows one prompt: an engine with a single request."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.kv_cache import PageTable, Span, make_batch, pages_for
from megatron_samoe.inference.rank_runner import RankRunner
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.runtime.load import LoadedModel


def generate_ids(
    loaded: LoadedModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """Returns the ids that follow a prompt, up to an end-of-document token or a full context.

    A longer prompt is cut from the left to half the context. Every rank of a layout gets the same ids.

    Raises:
        ConfigError: the prompt is empty or an option is out of range.
    """
    engine = Engine(loaded, max_batch=1)
    options = SamplingOptions(max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    if len(prompt) > engine.context_length:
        prompt = prompt[-(engine.context_length // 2) :]
    engine.submit(Request(prompt, options))
    ids = []
    while engine.has_work:
        ids += [event.token_id for event in engine.step()]
    return ids[:-1] if ids[-1:] == [loaded.tokenizer.eod] else ids


def next_token_logits(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """Returns fp32 logits_V of the token after `ids`, on every rank of the layout; all ranks call it together."""
    if not 0 < len(ids) <= loaded.config.model.max_positions:
        raise ConfigError("ids", len(ids), f"1 to {loaded.config.model.max_positions} tokens")
    num_pages = pages_for(len(ids))
    runner = RankRunner(loaded, num_pages)
    pages = PageTable(1, num_pages, num_pages, runner.device)
    span = Span(pages.reserve(len(ids)), 0, len(ids))
    return runner.run(make_batch([span], ids, pages.table, [len(ids) - 1], runner.device))[0]


@torch.no_grad()
def generate_text(loaded: LoadedModel, prompt: str, max_new_tokens: int, **options: float) -> str:
    """Returns the text that follows a prompt; options as in `generate_ids`."""
    ids = loaded.tokenizer.encode(prompt)
    new_ids = generate_ids(loaded, ids, max_new_tokens, **options)  # type: ignore[arg-type]
    # Decoded together with the prompt: a token's text can depend on the one before it.
    whole, start = loaded.tokenizer.decode(ids + new_ids), loaded.tokenizer.decode(ids)
    return whole[len(start) :] if whole.startswith(start) else loaded.tokenizer.decode(new_ids)
