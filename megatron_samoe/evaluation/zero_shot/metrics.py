"""Metrics as statistics of sums.

A metric turns items and responses into one vector per unit, x_UV (a unit is an item, or a question of several items), and
is a function of the vectors' sum: accuracy is sum(right) / sum(1), F1 is 2 sum(hits) / (sum(yes) + sum(gold)). Resampling
units, and comparing two models on the same units, then work for every metric in the same way.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_samoe.evaluation.zero_shot.items import Item, Response, groups_of

Units = Callable[[Sequence[Item], Sequence[Response]], np.ndarray]
#: Gives value [...] of sums [..., V].
Finish = Callable[[np.ndarray], np.ndarray]
RANKED = ("multiple_choice", "partial")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        units: gives x_UV in fp64.
        finish: of sums over units.
        kinds: kinds of task that it has a meaning for.
        in_percent: shown times 100.
        needs_group: counts whole questions.
        binary: the value is a share of units that are right; its x_UV is (0 or 1, 1).
    """

    units: Units
    finish: Finish
    kinds: tuple[str, ...]
    in_percent: bool = True
    needs_group: bool = False
    binary: bool = False


def prediction(item: Item, response: Response) -> int:
    """Returns the choice of highest log-likelihood, the first of equals."""
    return int(np.argmax(response.loglikelihoods))


def normalised_prediction(item: Item, response: Response, length: Callable[[str], int] = len) -> int:
    """Returns the choice of highest log-likelihood per character of its text, or per other unit of length.

    Characters are what lm-evaluation-harness's acc_norm counts, its acc_bytes UTF-8 bytes.
    """
    lengths = [max(1, length(text)) for text in item.choice_texts]
    return int(np.argmax(np.array(response.loglikelihoods) / lengths))


def _num_bytes(text: str) -> int:
    return len(text.encode())


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = {ord(c): " " for c in string.punctuation + "‘’´`"}


def normalise_answer(text: str) -> str:
    """Returns an answer in lower case without punctuation, articles and spare white space (TriviaQA's own rule)."""
    text = text.lower().replace("_", " ").translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def is_right(item: Item, response: Response) -> bool:
    """Whether an item counts as answered by the plainest rule of its kind."""
    if item.answers:
        return normalise_answer(response.text) in set(map(normalise_answer, item.answers))
    if len(item.pairs) == 1:
        return response.is_greedy[0]
    return prediction(item, response) == item.gold


def _means(values: Iterable[float]) -> np.ndarray:
    """Returns (value, 1) of each unit, whose sums have a mean."""
    column = np.fromiter(values, dtype=np.float64)
    return np.stack((column, np.ones_like(column)), axis=1)


def _share(right: Callable[[Item, Response], bool]) -> Units:
    return lambda items, responses: _means(map(right, items, responses))


def _ratio(sums: np.ndarray, below: int = 1, above: int = 0) -> np.ndarray:
    """Returns one column's sum over another's."""
    return np.asarray(sums[..., above] / sums[..., below])


def _exp(x: np.ndarray) -> np.ndarray:
    """Returns e^x; infinity, without a warning, where that is beyond all numbers."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(x))


def _loglikelihood(items: Sequence[Item], responses: Sequence[Response]) -> np.ndarray:
    return _means(response.loglikelihoods[0] for response in responses)


def _exact_questions(items: Sequence[Item], responses: Sequence[Response]) -> np.ndarray:
    right = list(map(is_right, items, responses))
    return _means(all(right[n] for n in group) for group in groups_of(items))


def _answers_per_question(items: Sequence[Item], responses: Sequence[Response]) -> np.ndarray:
    """Returns (right, answers, said yes, is yes, both) of each question; choice 1 is "yes"."""
    said = np.array([prediction(i, r) == 1 for i, r in zip(items, responses, strict=True)], dtype=np.float64)
    gold = np.array([i.gold == 1 for i in items], dtype=np.float64)
    x_NV = np.stack(((said == gold).astype(np.float64), np.ones_like(said), said, gold, said * gold), axis=1)
    return np.stack([x_NV[group].sum(0) for group in groups_of(items)])


def _f1(hits: np.ndarray, said: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Returns 2 hits / (said + gold), 0 where that is 0 / 0."""
    total = said + gold
    return np.asarray(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0))


def _class_counts(items: Sequence[Item], responses: Sequence[Response]) -> np.ndarray:
    """Returns (hits, said, gold) of each class, side by side."""
    num_classes = max(len(item.pairs) for item in items)
    x_UVC = np.zeros((len(items), 3, num_classes))
    for row, (item, response) in enumerate(zip(items, responses, strict=True)):
        said = prediction(item, response)
        x_UVC[row, 0, said] = said == item.gold
        x_UVC[row, 1, said] = 1
        x_UVC[row, 2, item.gold] = 1
    return x_UVC.reshape(len(items), -1)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Returns the mean F1 of the classes that occur, in the data or in what was said."""
    hits, said, gold = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    return np.asarray(_f1(hits, said, gold).sum(-1) / (said + gold > 0).sum(-1))


def _normalised(length: Callable[[str], int] = len) -> Units:
    return _share(lambda item, response: normalised_prediction(item, response, length) == item.gold)


def _perplexity(column: int = 1) -> Finish:
    """Returns the perplexity per unit that a column counts."""
    return lambda sums: _exp(-_ratio(sums, column))


METRICS: dict[str, Metric] = {
    "acc": Metric(_share(is_right), _ratio, (*RANKED, "greedy_match"), binary=True),
    "acc_norm": Metric(_normalised(), _ratio, RANKED, binary=True),
    "acc_bytes": Metric(_normalised(_num_bytes), _ratio, RANKED, binary=True),
    "exact_match": Metric(_share(is_right), _ratio, ("generate",), binary=True),
    "perplexity": Metric(_loglikelihood, _perplexity(), ("greedy_match",), in_percent=False),
    "f1_macro": Metric(_class_counts, _macro_f1, RANKED),
    # MultiRC's four; see docs/evaluation.md for why they belong together.
    "acc_per_answer": Metric(_answers_per_question, _ratio, RANKED, needs_group=True),
    "em": Metric(_exact_questions, _ratio, RANKED, needs_group=True, binary=True),
    "f1a": Metric(_answers_per_question, lambda s: _f1(s[..., 4], s[..., 2], s[..., 3]), RANKED, needs_group=True),
    "yes_share": Metric(_answers_per_question, lambda s: _ratio(s, above=2), RANKED, needs_group=True),
}

#: Metrics beside which the best constant choice says something.
SHARES_OF_ITEMS = ("acc", "acc_norm", "acc_bytes", "acc_per_answer")


def _of_corpus(finish: Finish) -> Metric:
    return Metric(lambda *_: np.empty(0), finish, ("corpus",), in_percent=False)


#: Of whole texts; x_UV is (log-likelihood, tokens, bytes, words) of each document.
CORPUS_METRICS: dict[str, Metric] = {
    "token_perplexity": _of_corpus(_perplexity(1)),
    "byte_perplexity": _of_corpus(_perplexity(2)),
    "word_perplexity": _of_corpus(_perplexity(3)),
    "bits_per_byte": _of_corpus(lambda sums: -_ratio(sums, 2) / np.log(2.0)),
}
