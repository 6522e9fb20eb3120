"""The requests of an engine, and its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megatron_samoe.inference.sampling import SamplingOptions

#: stop: an end-of-document token or a stop text; length: max_new_tokens are made, or the context is full.
FinishReason = Literal["stop", "length"]
#: Most alternatives whose log-probabilities are reported with a token's.
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        logprobs: number of most probable tokens to report with each token's log-probability; None reports nothing.
        scores_prompt: report them for the prompt's tokens, too.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    logprobs: int | None = None
    scores_prompt: bool = False


class TokenScore(NamedTuple):
    """How probable the model held a token, before temperature, penalties and cuts.

    Attributes:
        logprob: natural logarithm.
        top: the most probable tokens at its position, best first, with theirs.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenEvent(NamedTuple):
    """One new token of a request.

    Attributes:
        token_id: the new token; also an end-of-document token, which has no text.
        finish_reason: None while the request runs.
        text: text that can be shown now. It can be empty, where a token ends within a character or the text so far
            could be the start of a stop text, and longer than the token's where it was held back before.
        score: of the new token, where the request asks for it.
        prompt_scores: with the first token, those of the prompt's tokens after its first, where the request asks.
    """

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    text: str
    score: TokenScore | None = None
    prompt_scores: tuple[TokenScore, ...] = ()
