"""What is asked of a predictor, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
        name: "FILE:LINE"-like place in the data, for messages and per-item output.
        contexts: what the model reads; one, or one for each choice (partial scoring).
        continuations: what is scored after the context; one, or one for each choice. Empty where text is generated.
        gold: index of the right choice; 0 where there is one continuation.
        answers: texts that count as right where text is generated.
        group: items with the same group are one question to the metrics that count whole questions.
        choice_texts: the choices as a reader sees them, for length normalisation and output.
    """

    name: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()
    group: str = ""
    choice_texts: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(context, continuation) of each choice."""
        count = max(len(self.contexts), len(self.continuations))
        contexts = self.contexts * (count if len(self.contexts) == 1 else 1)
        continuations = self.continuations * (count if len(self.continuations) == 1 else 1)
        return tuple(zip(contexts, continuations, strict=True))


@dataclass(frozen=True)
class Response:
    """A predictor's answer to one item.

    Attributes:
        loglikelihoods: of each choice's continuation, natural logarithm.
        is_greedy: whether each continuation is what greedy decoding would give.
        text: what was generated.
        cut_tokens: context tokens that did not fit into the model and were left out, of the choice with most.
        in_windows: a continuation was longer than the model's sequence and was scored in several windows.
    """

    loglikelihoods: tuple[float, ...] = ()
    is_greedy: tuple[bool, ...] = ()
    text: str = ""
    cut_tokens: int = 0
    in_windows: bool = False


@dataclass(frozen=True)
class Document:
    """A text whose perplexity is measured.

    Its bytes and words are those of the text as it was before any tokenizer.
    """

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @property
    def num_words(self) -> int:
        """Parts between runs of white space, counted as lm-evaluation-harness does (an empty part at an end counts)."""
        return len(re.split(r"\s+", self.text))


def groups_of(items: Iterable[Item]) -> list[list[int]]:
    """Returns the numbers of the items of each group, in order of first appearance; an item without group is one."""
    numbered = [(item.group or f"\0{n}", n) for n, item in enumerate(items)]
    order = {group: place for place, group in reversed(list(enumerate(group for group, _ in numbered)))}
    numbered.sort(key=lambda pair: (order[pair[0]], pair[1]))
    return [[n for _, n in members] for _, members in groupby(numbered, key=lambda pair: pair[0])]
