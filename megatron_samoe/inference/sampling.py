"""Choosing the next token: options, their rules, and the arithmetic on one row of logits.

One row at a time, in numpy: a request's choices depend only on its own logits, options and seed, never on what else is
in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_samoe.errors import CheckpointError, ConfigError, ConfigErrors


@dataclass(frozen=True)
class SamplingOptions:
    """How a request's tokens are chosen and when it ends.

    Attributes:
        max_new_tokens: most tokens to generate; fewer where the model's context is full before.
        temperature: divides logits; 0 takes the most probable token (equal ones by the lower id).
        top_k: number of most probable tokens to sample from; all if 0.
        top_p: sample among the fewest most probable tokens that hold this probability (nucleus, arXiv:1904.09751).
        repetition_penalty: divides positive and multiplies negative logits of tokens that the prompt or the result
            holds (CTRL, arXiv:1909.05858).
        stop: texts that end the result; they are not part of it.
        seed: of this request's choices.
        ignore_eod: generate on after an end-of-document token, for measurements.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eod: bool = False


def check_sampling(options: SamplingOptions) -> None:
    """Raises ConfigError that names each option out of range."""
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("max_new_tokens", lambda x: _is_whole(x) and x >= 1, "must be a whole number, 1 or more"),
        ("top_k", lambda x: _is_whole(x) and x >= 0, "must be a whole number, 0 (all tokens) or more"),
        ("seed", lambda x: _is_whole(x) and 0 <= x < 2**64, "must be a whole number from 0 to 2**64 - 1"),
        ("temperature", lambda x: _is_number(x) and x >= 0, "must be 0 (the most probable token) or more"),
        ("top_p", lambda x: _is_number(x) and 0 < x <= 1, "must be above 0 and at most 1"),
        # Within these bounds a penalised logit is finite in fp32 wherever the model's own is.
        (
            "repetition_penalty",
            lambda x: _is_number(x) and 0.01 <= x <= 100,
            "must be from 0.01 to 100; 1 changes nothing",
        ),
        ("stop", _are_texts, "must be a sequence of texts that are not empty"),
    )
    given = {name: getattr(options, name) for name, *_ in checks}
    errors = [ConfigError(name, given[name], allowed) for name, fits, allowed in checks if not fits(given[name])]
    if errors:
        raise ConfigErrors(errors)


def log_probabilities(logits_V: np.ndarray) -> np.ndarray:
    """Returns the natural logarithms of a softmax, in fp64."""
    shifted = logits_V.astype(np.float64) - logits_V.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result


def most_probable(values_V: np.ndarray, count: int) -> list[int]:
    """Returns the indices of the largest values, best first, equal ones by the lower index."""
    count = min(count, values_V.size)
    if count == 0:
        return []
    among = np.flatnonzero(values_V >= np.partition(values_V, -count)[-count])
    return among[np.argsort(-values_V[among], kind="stable")][:count].tolist()


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_texts(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(text, str) and text for text in value)


class Sampler:
    """One request's choices.

    Args:
        prompt_ids: tokens that the repetition penalty counts as seen.
    """

    def __init__(self, options: SamplingOptions, prompt_ids: Iterable[int], vocab_size: int):
        self._options = options
        self._random = np.random.Generator(np.random.Philox(key=int(options.seed)))
        self._seen_V: np.ndarray | None = None
        if options.repetition_penalty != 1.0:
            self._seen_V = np.zeros(vocab_size, dtype=bool)
            self._seen_V[list(prompt_ids)] = True

    def choose(self, logits_V: np.ndarray) -> int:
        """Returns the next token and counts it as seen; logits are fp32 and not changed.

        Raises:
            CheckpointError: no logit is a finite number, as damaged weights make them.
        """
        options = self._options
        if self._seen_V is not None:
            penalised = np.where(
                logits_V > 0, logits_V / options.repetition_penalty, logits_V * options.repetition_penalty
            )
            logits_V = np.where(self._seen_V, penalised, logits_V)
        best = int(logits_V.argmax())
        if not np.isfinite(logits_V[best]):
            raise CheckpointError(
                f"The model's largest logit is {logits_V[best]}: its weights or its input are damaged."
            )
        chosen = best if options.temperature == 0 else self._sample(logits_V)
        if self._seen_V is not None:
            self._seen_V[chosen] = True
        return chosen

    def _sample(self, logits_V: np.ndarray) -> int:
        options = self._options
        ids = np.arange(logits_V.size)
        if 0 < options.top_k < logits_V.size:
            least = np.partition(logits_V, -options.top_k)[-options.top_k]
            ids = np.flatnonzero(logits_V >= least)
        scaled = logits_V[ids].astype(np.float64)
        with np.errstate(over="ignore"):  # a temperature near 0: all but the most probable come to exp(-inf) = 0
            weights = np.exp((scaled - scaled.max()) / options.temperature)
        if options.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            kept = np.sort(order[before < options.top_p * weights.sum()])
            ids, weights = ids[kept], weights[kept]
        ends = np.cumsum(weights)
        index = int(np.searchsorted(ends, self._random.random() * ends[-1], side="right"))
        return int(ids[min(index, ids.size - 1)])
