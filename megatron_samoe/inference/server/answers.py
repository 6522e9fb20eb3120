"""The bodies of answers, complete and streamed, in the shapes of OpenAI's API."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.inference.request import TokenEvent, TokenScore
from megatron_samoe.inference.server.protocol import CompletionCall
from megatron_samoe.inference.text_stream import REPLACEMENT


class CompletionAnswers:
    """The bodies of one answer of `/v1/completions`.

    Log-probabilities come with each token's text, and its offset in the choice's text. Tokens may end within a character; a
    token's text is then a replacement sign, and two of "top_logprobs" may be equal, of which the more probable is kept.
    """

    prefix, complete, piece = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: CompletionCall, model: str, tokenizer: Tokenizer, created: int):
        self._call, self._decode = call, tokenizer.decode
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": created, "model": model}
        # Of a choice that begins with its prompt, until that is sent.
        self._prompts = [list(r.prompt_ids) if r.scores_prompt else [] for r in call.requests]
        self._offsets = [0] * len(call.requests)

    def body(self, choices: Sequence[dict], num_tokens: int | None, streamed: bool = False) -> dict[str, Any]:
        """Returns an answer, or one piece of a streamed one, with the numbers of tokens if that of new ones is given."""
        body = {**self._head, "object": self.piece if streamed else self.complete, "choices": list(choices)}
        if num_tokens is not None:
            total = self._call.prompt_tokens + num_tokens
            counts = {"prompt_tokens": self._call.prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}
            body["usage"] = counts
        return body

    def opening(self, index: int) -> dict | None:
        """Returns the piece with which a choice's stream begins before its first token, if it does."""
        head = self._call.heads[index]
        return None if not head or self._call.tells_logprobs else self.streamed(index, head, None)

    def choice(self, index: int, text: str, reason: str | None, logprobs: dict | None) -> dict:
        """Returns one choice of an answer."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def streamed(self, index: int, text: str, reason: str | None, logprobs: dict | None = None) -> dict:
        """Returns a piece of a choice."""
        return self.choice(index, text, reason, logprobs)

    def logprobs(self, index: int, event: TokenEvent) -> dict[str, list]:
        """Returns the log-probabilities of a choice's new token, with the first those of the prompt before it."""
        scores: list[TokenScore | None] = [event.score] if self._call.adds_tokens else []
        ids = [event.token_id] if self._call.adds_tokens else []
        if prompt := self._prompts[index]:
            # Nothing precedes the first token, so it has no probability.
            ids, scores = [*prompt, *ids], [None, *event.prompt_scores, *scores]
            self._prompts[index] = []
        texts = [self._decode([token]) for token in ids]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [score and score.logprob for score in scores],
            "top_logprobs": [score and self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token_id, score.logprob)):
            found.setdefault(self._decode([token]), logprob)
        return found


class ChatAnswers(CompletionAnswers):
    """The bodies of one answer of `/v1/chat/completions`."""

    prefix, complete, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict | None:
        return self._piece(index, {"role": "assistant", "content": ""}, None, None)

    def choice(self, index: int, text: str, reason: str | None, logprobs: dict | None) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def streamed(self, index: int, text: str, reason: str | None, logprobs: dict | None = None) -> dict:
        return self._piece(index, {"content": text} if text else {}, reason, logprobs)

    def _piece(self, index: int, delta: dict[str, str], reason: str | None, logprobs: dict | None) -> dict:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, index: int, event: TokenEvent) -> dict[str, list]:
        assert event.score is not None
        top = [self._token(*pair) for pair in event.score.top]
        return {"content": [{**self._token(event.token_id, event.score.logprob), "top_logprobs": top}]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode([token])
        # Within a character its bytes are not known.
        return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


def joined_logprobs(parts: Sequence[dict[str, list]]) -> dict[str, list] | None:
    """Returns the "logprobs" of an answer from those of its tokens; None without any."""
    return {key: [value for part in parts for value in part[key]] for key in parts[0]} if parts else None
