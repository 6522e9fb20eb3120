"""What transformers' logits processors make of logits, and whether tokens were drawn from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import chi2

#: The least probability of drawn tokens under the distribution they are said to have.
LEAST = 1e-4


def their_probabilities(
    logits_V: np.ndarray,
    history: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> np.ndarray:
    """Returns the distribution of the next token, by transformers in its order; temperature 0 is its greedy choice.

    Args:
        history: tokens of the prompt and the result so far.
    """
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = [process.RepetitionPenaltyLogitsProcessor(repetition_penalty)]
    steps += [process.TemperatureLogitsWarper(float(temperature))] if temperature else []
    steps += [process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = process.LogitsProcessorList(steps)(
        torch.tensor([list(history)]), torch.from_numpy(logits_V)[None].double()
    )
    if not temperature:
        scores = torch.full_like(scores, -torch.inf).scatter(1, scores.argmax(-1, keepdim=True), 0.0)
    return scores[0].softmax(-1).numpy()


def assert_drawn_from(draws: Sequence[tuple[np.ndarray, Sequence[int]]]) -> None:
    """Holds independent draws of tokens against the distributions that they are said to have: Pearson's chi-square test.

    Args:
        draws: distributions, each with the tokens drawn from it.
    """
    distance, freedom = 0.0, 0
    for probabilities_V, tokens in draws:
        counts_V, expected_V = np.bincount(tokens, minlength=probabilities_V.size), probabilities_V * len(tokens)
        outside = np.flatnonzero(counts_V * (expected_V == 0))
        assert not outside.size, f"tokens {outside} are drawn, which transformers cuts"
        # Tokens expected less than 5 times count as one, together with the likeliest.
        rare = (expected_V < 5) | (expected_V == expected_V.max())
        counts, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts_V, expected_V))
        distance += float(((counts - expected) ** 2 / expected).sum())
        freedom += len(counts) - 1
    likely = chi2.sf(distance, freedom) if freedom else 1.0
    assert likely > LEAST, f"chi-square {distance:.0f} with {freedom} degrees of freedom: p {likely:.1e}"
