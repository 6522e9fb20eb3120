"""Who answers: a model, or one of the predictors that a metric must be able to tell from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_samoe.errors import ConfigError, nearest
from megatron_samoe.evaluation.zero_shot.batched_forward import Answer, answer_queries
from megatron_samoe.evaluation.zero_shot.encode import Query, encode_pair, encode_prompt, rolling_queries
from megatron_samoe.evaluation.zero_shot.items import Document, Item, Response
from megatron_samoe.evaluation.zero_shot.task import Task
from megatron_samoe.runtime.load import LoadedModel

#: Makes a progress display from a name and a total: a context manager whose value is called with advances.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]
CONSTANT = ("always-yes", "always-no", "oracle")


class Predictor(Protocol):
    """Answers a task's items, in their order."""

    def respond(self, task: Task, items: Sequence[Item]) -> list[Response]:
        """Returns one response per item."""
        ...


@dataclass(frozen=True)
class ConstantPredictor:
    """Always the task's "yes" choice (the first if it names none), or its "no" (the last); or the right one, always.

    Where there are no choices it says the word. It shows what a metric gives to who has read nothing, or knows all.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in CONSTANT:
            raise ConfigError(
                "--predictor",
                self.name,
                f"must be model or one of {', '.join(CONSTANT)}.{nearest(self.name, CONSTANT)}",
            )

    def respond(self, task: Task, items: Sequence[Item]) -> list[Response]:
        """Returns one response per item."""
        return [self._one(task, item) for item in items]

    def _one(self, task: Task, item: Item) -> Response:
        word = self.name.removeprefix("always-")
        if task.kind == "generate":
            return Response(text=item.answers[0] if word == "oracle" else word)
        if task.kind == "greedy_match":
            right = word in ("oracle", item.choice_texts[0])
            return Response((0.0 if right else -math.inf,), (right,))
        count = len(item.pairs)
        given = task.always_yes if word == "yes" else task.always_no
        fallback = {"yes": 0, "no": count - 1, "oracle": item.gold}[word]
        choice = given if given is not None and word != "oracle" else fallback
        return Response(tuple(0.0 if n == choice else -math.inf for n in range(count)), (False,) * count)


def _silent(name: str, total: int) -> AbstractContextManager[Callable[[int], Any]]:
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class ModelPredictor:
    """A model, by log-likelihood and greedy decoding.

    Args:
        batch_size: sequences of a forward pass; see `answer_queries`.
    """

    loaded: LoadedModel
    batch_size: int | None = None
    progress: Progress = _silent

    @property
    def seq_length(self) -> int:
        """Most tokens that are read at a time."""
        return self.loaded.config.model.seq_length

    def check(self, task: Task) -> None:
        """Raises DataError for a task whose answers are longer than what the model reads."""
        if task.kind == "generate":
            encode_prompt(self.loaded.tokenizer, "", self.seq_length, task.max_new_tokens)

    def respond(self, task: Task, items: Sequence[Item]) -> list[Response]:
        """Returns one response per item; all ranks of the layout call it together."""
        if task.kind == "generate":
            # Models write the space before a word with the word.
            prompts = [item.contexts[0].rstrip() for item in items]
            texts = self.generate(prompts, task.until, task.max_new_tokens, task.name)
            return [Response(text=text.strip(), cut_tokens=cut) for text, cut in texts]
        pairs = [pair for item in items for pair in item.pairs]
        scores = iter(self.score_pairs(pairs, task.name))
        return [_response([next(scores) for _ in item.pairs]) for item in items]

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
        """Returns (log-likelihood, tokens) of whole texts, in rolling windows."""
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


def _response(scores: list[Score]) -> Response:
    return Response(
        tuple(score.loglikelihood for score in scores),
        tuple(score.is_greedy for score in scores),
        cut_tokens=max(score.cut_tokens for score in scores),
        in_windows=any(score.num_windows > 1 for score in scores),
    )


def _new_text(
    decode: Callable[[list[int]], str], ids: list[int], prompt_length: int, until: Sequence[str]
) -> tuple[str, bool]:
    """Returns (text after the prompt and before the first stop, whether a stop was met)."""
    # Decoded together with the prompt's end: a token's text can depend on the one before it.
    whole, start = decode(ids[prompt_length - 1 :]), decode(ids[prompt_length - 1 : prompt_length])
    text = whole[len(start) :] if whole.startswith(start) else decode(ids[prompt_length:])
    ends = [place for place in (text.find(stop) for stop in until) if place >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
