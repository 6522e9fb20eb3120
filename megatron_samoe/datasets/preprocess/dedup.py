"""De-duplication of documents in the order of the corpus: the first of equal (or nearly equal) documents stays.

Workers reduce a document to 64-bit keys; the coordinator, which sees documents in order, decides. Equal keys of
different documents are possible but rare: n documents give a false match with a chance of about n^2 / 2^65 (0.3 %
for one wrong document in 300 million).
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import regex

NUM_PERMUTATIONS = 112
SHINGLE_WORDS = 5
_WORDS = regex.compile(r"\w+")


def exact_key(texts: tuple[str, ...]) -> np.ndarray:
    """Returns the key of a document, uint64 [1]."""
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u8")


@functools.cache
def choose_bands(threshold: float) -> tuple[int, int]:
    """Returns (bands, rows) of NUM_PERMUTATIONS whose curve 1 - (1 - s^rows)^bands is steepest near `threshold`."""
    shapes = [(NUM_PERMUTATIONS // rows, rows) for rows in range(1, 29)]
    return min(shapes, key=lambda shape: abs((1 / shape[0]) ** (1 / shape[1]) - threshold))


@functools.cache
def _seeds() -> np.ndarray:
    return np.random.default_rng(20240229).integers(0, 1 << 64, NUM_PERMUTATIONS, dtype=np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Returns a well-spread hash of uint64 values (the finalizer of SplitMix64; products wrap)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def signature(text: str) -> np.ndarray:
    """Returns the MinHash signature of the sets of SHINGLE_WORDS consecutive words, uint64 [NUM_PERMUTATIONS]."""
    words = _WORDS.findall(text.lower())
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    hashed = b"".join(hashlib.blake2b(shingle.encode(), digest_size=8).digest() for shingle in shingles)
    values = np.frombuffer(hashed, dtype="<u8")
    smallest = np.full(NUM_PERMUTATIONS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(values), 4096):
        block = _mix(values[None, start : start + 4096] ^ _seeds()[:, None])
        smallest = np.minimum(smallest, block.min(axis=1))
    return smallest


def minhash_keys(texts: tuple[str, ...], threshold: float) -> np.ndarray:
    """Returns one key per band, uint64 [bands]; documents that share a key count as nearly equal.

    Two documents whose shingle sets overlap by s (Jaccard) share one with chance 1 - (1 - s^rows)^bands
    (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4).
    """
    bands, rows = choose_bands(threshold)
    values = signature("\n".join(texts))
    keys = [
        hashlib.blake2b(bytes([band]) + values[band * rows : (band + 1) * rows].tobytes(), digest_size=8).digest()
        for band in range(bands)
    ]
    return np.frombuffer(b"".join(keys), dtype="<u8")


class KeySet:
    """A growing set of uint64 keys at 8 bytes each: sorted runs, merged when two are of like size."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Returns for each key whether it is in the set."""
        found = np.zeros(keys.shape, dtype=bool)
        for run in self._runs:
            nearest = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[nearest] == keys
        return found

    def add(self, keys: np.ndarray) -> None:
        """Adds keys."""
        if keys.size == 0:
            return
        self._runs.append(np.unique(keys))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last, before = self._runs.pop(), self._runs.pop()
            merged = np.concatenate((before, last))
            merged.sort(kind="stable")
            self._runs.append(merged)


def first_of_each(keys: np.ndarray, seen: KeySet) -> np.ndarray:
    """Returns which documents stay, bool [documents], and adds the keys of those to `seen`.

    `keys` is uint64 [documents, bands]: a document goes if one of its keys belongs to an earlier one that stayed.
    """
    keep = np.asarray(~seen.contains(keys).any(axis=1))
    fresh: set[int] = set()
    for number in np.flatnonzero(keep).tolist():
        row = keys[number].tolist()
        if fresh.isdisjoint(row):
            fresh.update(row)
        else:
            keep[number] = False
    seen.add(keys[keep].reshape(-1))
    return keep
