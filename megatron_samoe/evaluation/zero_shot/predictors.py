"""A model's answers to texts: log-likelihoods and greedy decoding, in any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from megatron_samoe.evaluation.zero_shot.batched_forward import Answer, answer_queries
from megatron_samoe.evaluation.zero_shot.data_files import Document
from megatron_samoe.evaluation.zero_shot.encode import Query, encode_pair, encode_prompt, rolling_queries
from megatron_samoe.runtime.load import LoadedModel

#: Makes a progress display from a name and a total: a context manager whose value is called with advances.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


def silent(name: str, total: int) -> AbstractContextManager[Callable[[int], Any]]:
    """No progress display."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class ModelPredictor:
    """A model, by log-likelihood and greedy decoding.

    Args:
        batch_size: sequences of a forward pass; see `answer_queries`.
    """

    loaded: LoadedModel
    batch_size: int | None = None
    progress: Progress = silent

    @property
    def seq_length(self) -> int:
        """Most tokens that are read at a time."""
        return self.loaded.config.model.seq_length

    def score_pairs(self, pairs: Sequence[tuple[str, str]], name: str = "") -> list[Score]:
        """Returns the score of each (context, continuation)."""
        encoded = [encode_pair(self.loaded.tokenizer, *pair, self.seq_length) for pair in pairs]
        answers = iter(self._answer([query for pair in encoded for query in pair.queries], name))
        scores = []
        for pair in encoded:
            parts = [next(answers) for _ in pair.queries]
            loglikelihood = math.fsum(part.loglikelihood for part in parts)
            scores.append(Score(loglikelihood, all(part.is_greedy for part in parts), pair.cut_tokens, len(parts)))
        return scores

    def loglikelihood_of(self, documents: Sequence[Document]) -> list[tuple[float, int]]:
        """Returns (log-likelihood, tokens) of texts, in rolling windows."""
        rows = [self.loaded.tokenizer.encode(document.text) for document in documents]
        windows = [rolling_queries(ids, self.loaded.tokenizer.eod, self.seq_length) for ids in rows]
        answers = iter(self._answer([query for part in windows for query in part], "corpus"))
        return [
            (math.fsum(next(answers).loglikelihood for _ in part), len(ids))
            for ids, part in zip(rows, windows, strict=True)
        ]

    def generate(
        self, prompts: Sequence[str], until: Sequence[str], max_new_tokens: int, name: str = ""
    ) -> list[tuple[str, int]]:
        """Returns (greedy text after each prompt up to the first of `until`, tokens cut from the prompt)."""
        tokenizer = self.loaded.tokenizer
        cut = [encode_prompt(tokenizer, prompt, self.seq_length, max_new_tokens) for prompt in prompts]
        grown = [list(ids) for ids, _ in cut]
        texts = [""] * len(prompts)
        active = list(range(len(prompts)))
        with self.progress(name, len(prompts)) as advance:
            for _ in range(max_new_tokens):
                queries = [Query(tuple(grown[n][-self.seq_length :])) for n in active]
                answers = answer_queries(self.loaded, queries, self.batch_size)
                going = []
                for n, answer in zip(active, answers, strict=True):
                    if answer.next_id == tokenizer.eod:
                        continue
                    grown[n].append(answer.next_id)
                    texts[n], ended = _new_text(tokenizer.decode, grown[n], len(cut[n][0]), until)
                    going += [] if ended else [n]
                advance(len(active) - len(going))
                active = going
                if not active:
                    break
        return [(text, tokens) for text, (_, tokens) in zip(texts, cut, strict=True)]

    def _answer(self, queries: list[Query], name: str) -> list[Answer]:
        with self.progress(name, len(queries)) as advance:
            return answer_queries(self.loaded, queries, self.batch_size, advance)


@dataclass(frozen=True)
class Score:
    """Of one continuation; `cut_tokens` and `num_windows` say how it was made to fit."""

    loglikelihood: float
    is_greedy: bool
    cut_tokens: int
    num_windows: int


def _new_text(
    decode: Callable[[list[int]], str], ids: list[int], prompt_length: int, until: Sequence[str]
) -> tuple[str, bool]:
    """Returns (text after the prompt and before the first stop, whether a stop was found)."""
    # Decoded together with the prompt's end: a token's text can depend on the one before it.
    decoded, start = decode(ids[prompt_length - 1 :]), decode(ids[prompt_length - 1 : prompt_length])
    text = decoded[len(start) :] if decoded.startswith(start) else decode(ids[prompt_length:])
    ends = [position for position in (text.find(stop) for stop in until) if position >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
