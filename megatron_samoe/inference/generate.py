"""Text that follows one prompt: an engine with a single request."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.runtime.load import LoadedModel


def generate_ids(loaded: LoadedModel, prompt: list[int], max_new_tokens: int, **options: float) -> list[int]:
    """Returns the ids that follow a prompt, up to an end-of-document token or a full context.

    A longer prompt is cut from the left to half the context. Every rank of a layout gets the same ids.

    Args:
        options: other fields of `SamplingOptions`.

    Raises:
        ConfigError: the prompt is empty or an option is out of range.
    """
    ids = [event.token_id for event in _generated(loaded, prompt, max_new_tokens, options)]
    return ids[:-1] if ids[-1:] == [loaded.tokenizer.eod] else ids


def generate_text(loaded: LoadedModel, prompt: str, max_new_tokens: int, **options: float) -> str:
    """Returns the text that follows a prompt; see `generate_ids`."""
    ids = loaded.tokenizer.encode(prompt)
    return "".join(event.text for event in _generated(loaded, ids, max_new_tokens, options))


def _generated(
    loaded: LoadedModel, prompt: list[int], max_new_tokens: int, options: dict[str, float]
) -> Iterator[TokenEvent]:
    engine = Engine(loaded, max_batch=1)
    if len(prompt) > engine.context_length:
        prompt = prompt[-(engine.context_length // 2) :]
    engine.submit(Request(prompt, SamplingOptions(max_new_tokens, **options)))  # type: ignore[arg-type]
    while engine.has_work:
        yield from engine.step()
