"""What goes into an engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_samoe.inference.sampling import SamplingOptions

#: stop: an end-of-document token or a stop text; length: max_new_tokens are made, or the context is full.
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it."""

    prompt_ids: Sequence[int]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


class TokenEvent(NamedTuple):
    """One new token of a request.

    Attributes:
        token_id: the new token; also an end-of-document token, which has no text.
        finish_reason: None while the request goes on.
        text: text that can be shown now. It can be empty, where a token ends within a character or the text so far
            could be the start of a stop text, and longer than the token's where it was held back before.
    """

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    text: str
