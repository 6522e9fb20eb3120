"""Blends as users write them: prefixes, weight prefix weight prefix ..., or a YAML file; and splits like 969,30,1."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_samoe.errors import DataError, shown
from megatron_samoe.parsing import finite_float, parse_yaml, read_text

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Blend:
    """Dataset prefixes and their weights (None: in proportion to their sizes)."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        bad = [w for w in self.weights if not math.isfinite(w) or w < 0]
        if bad or sum(self.weights) <= 0:
            raise DataError(
                f"The blend weights {', '.join(map(str, self.weights))} are not usable: each must be a finite number "
                "of at least 0, and one must be above 0."
            )

    def without_zero_weights(self) -> Blend:
        """Returns the blend less the datasets that nothing is drawn from."""
        if self.weights is None:
            return self
        kept = [(p, w) for p, w in zip(self.prefixes, self.weights, strict=True) if w > 0]
        return Blend(tuple(p for p, _ in kept), tuple(w for _, w in kept))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_blend(words: Sequence[str]) -> Blend | dict[str, Blend]:
    """Returns the blend that the words of a `--data-path` describe (a dict by split where a YAML file says so).

    The words are one or more prefixes, or weight prefix pairs, or the name of one YAML file.
    """
    words = [word.strip() for word in words]
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return read_blend_yaml(words[0])
    numbers = [_number(word) for word in words]
    if len(words) % 2 == 0 and all(n is not None for n in numbers[::2]):
        return Blend(tuple(words[1::2]), tuple(float(n) for n in numbers[::2] if n is not None))
    if any(n is not None and not os.path.exists(word + ".idx") for word, n in zip(words, numbers, strict=True)):
        raise DataError(
            f"The data path {' '.join(words)!r} mixes weights and prefixes: write only prefixes, or a weight in front "
            "of every prefix (30 a_text_document 70 b_text_document)."
        )
    return Blend(tuple(words))


def read_blend_yaml(path: str) -> Blend | dict[str, Blend]:
    """Returns the blend in a YAML file: a list of prefixes or {path, weight} entries, or such a list per split.

    Relative paths are relative to the file.
    """
    try:
        content = parse_yaml(read_text(path))
    except OSError as error:
        raise DataError(f"The blend {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"The blend {path} is not YAML: {error}") from error
    if isinstance(content, dict):
        unknown = [key for key in content if key not in SPLITS]
        if unknown or not content:
            raise DataError(f"The blend {path} has the key {shown(unknown[:1])}; allowed are {', '.join(SPLITS)}.")
        return {split: _blend_from_list(entries, path) for split, entries in content.items()}
    return _blend_from_list(content, path)


def _blend_from_list(entries: Any, path: str) -> Blend:
    if not isinstance(entries, list) or not entries:
        raise DataError(f"The blend {path} must be a list of datasets, not {shown(entries)}.")
    prefixes, weights = [], []
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - {"path", "weight"}:
            raise DataError(
                f"The blend {path} has the entry {shown(entry)}; an entry is a path or {{path: ..., weight: ...}}."
            )
        weight = entry.get("weight")
        if weight is not None and (isinstance(weight, str) or finite_float(weight) is None):
            raise DataError(f"The blend {path} has the weight {shown(weight)}, which is not a number.")
        prefix = entry["path"]
        prefixes.append(prefix if "://" in prefix else os.path.join(os.path.dirname(path), prefix))
        weights.append(weight)
    given = [float(w) for w in weights if w is not None]
    if given and len(given) != len(weights):
        raise DataError(f"The blend {path} gives weights to some datasets only; give them to all or to none.")
    return Blend(tuple(prefixes), tuple(given) if given else None)


def split_bounds(split: str) -> list[tuple[float, float] | None]:
    """Returns the (begin, end) shares of train, valid and test, None for an empty one, of a split like "969,30,1"."""
    words = re.split(r"[,/ ]+", split.strip())
    numbers = [_number(word) for word in words]
    if not 1 <= len(words) <= 3 or any(n is None or not math.isfinite(n) or n < 0 for n in numbers):
        raise DataError(
            f"--split {split!r} is not understood: write up to three shares of at least 0, such as 969,30,1."
        )
    shares = [n for n in numbers if n is not None] + [0.0] * (3 - len(numbers))
    if max(shares) <= 0:
        raise DataError(f"--split {split!r} gives every split nothing.")
    if sum(shares) > 1e300:
        raise DataError(f"--split {split!r} has shares that no sum can hold; 969,30,1 says the same as 9690,300,10.")
    import numpy as np

    # numpy's sum and quotient, then plain additions: the rounding that Megatron-core's bounds have.
    fractions = (np.array(shares) / np.sum(np.array(shares))).tolist()
    bounds: list[tuple[float, float] | None] = []
    begin = 0.0
    for fraction in fractions:
        end = begin + fraction
        bounds.append((begin, end) if end > begin else None)
        begin = end
    return bounds
