"""Texts to the token rows that a model scores: contexts cut from the left, long texts in windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import DataError


@dataclass(frozen=True)
class Query:
    """Tokens that a model reads, and what should follow.

    Attributes:
        tokens: the model's input, at least one token.
        labels: each of the last len(labels) input tokens is to predict one. None asks only for the next token.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncodedPair:
    """A context and its continuation as queries.

    Attributes:
        queries: one, or several windows where the continuation is longer than the model's sequence.
        cut_tokens: context tokens left out so that the rest fits.
    """

    queries: tuple[Query, ...]
    cut_tokens: int


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of its continuation.

    As lm-evaluation-harness does it: spaces at the context's end move to the continuation, both are encoded as one text,
    and that is split where the context's own ids end. Without context the continuation follows an end-of-document token.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if not context:
        ids = tokenizer.encode(continuation)
        return [tokenizer.eod], _some(ids, continuation)
    ids = _some(tokenizer.encode(context + continuation), context + continuation)
    # A tokenizer may join the two texts' border into the context's last token; something must be left to score.
    split = min(len(tokenizer.encode(context)), len(ids) - 1)
    if split == 0:
        return [tokenizer.eod], ids
    return ids[:split], ids[split:]


def _some(ids: list[int], text: str) -> list[int]:
    if not ids:
        raise DataError(f"the text {text[:40]!r} has no token, so nothing of it can be scored")
    return ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, seq_length: int) -> EncodedPair:
    """Returns what to ask a model that reads at most seq_length tokens."""
    context_ids, labels = split_pair(tokenizer, context, continuation)
    if len(labels) > seq_length:
        return EncodedPair(tuple(rolling_queries(labels, context_ids[-1], seq_length)), len(context_ids) - 1)
    # The last label is not read.
    room = seq_length + 1 - len(labels)
    kept = context_ids[-room:]
    return EncodedPair((Query((*kept, *labels[:-1]), tuple(labels)),), len(context_ids) - len(kept))


def rolling_queries(ids: Sequence[int], prefix: int, seq_length: int) -> list[Query]:
    """Returns windows in which every id is predicted once, the first after `prefix`.

    The first window predicts seq_length ids; later ones read the last id of the one before; the last reaches back so
    that it reads seq_length ids, of which it predicts those that are left (lm-evaluation-harness's rolling windows).
    """
    stream = [prefix, *ids]
    queries = []
    for start in range(0, len(ids), seq_length):
        end = min(start + seq_length, len(ids))
        first = max(0, end - seq_length)
        queries.append(Query(tuple(stream[first:end]), tuple(ids[start:end])))
    return queries


def encode_prompt(tokenizer: Tokenizer, context: str, seq_length: int, max_new_tokens: int) -> tuple[list[int], int]:
    """Returns (a prompt that leaves room for its answer, tokens cut from its left).

    Raises:
        DataError: the answer needs the complete sequence.
    """
    room = seq_length - max_new_tokens  # as in lm-evaluation-harness, although the answer's last token is not read
    if room < 1:
        raise DataError(
            f"answers of up to {max_new_tokens} tokens leave no room for a prompt: the model reads {seq_length} tokens"
        )
    ids = tokenizer.encode(context) or [tokenizer.eod]
    return ids[-room:], max(0, len(ids) - room)
