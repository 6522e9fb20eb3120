"""Tokens that an engine gives out are drawn from the distribution that transformers' logits processors compute."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from tests.harness.sampling import assert_drawn_from, their_probabilities
from tests.harness.tables import table
from tests.unit.inference.tiny_models import VOCAB, loaded_tiny

pytestmark = pytest.mark.parity

#: Distributions of a case, and requests for each, whose seeds follow each other as those of one request's choices do.
ROWS, REQUESTS = 4, 300


@pytest.mark.parametrize("options", table(__file__)["cases"], ids=str)
def test_tokens_are_drawn_as_transformers_says(options: dict[str, Any]) -> None:
    engine, draws = Engine(loaded_tiny("moe"), max_batch=REQUESTS, max_step_tokens=9 * REQUESTS), []
    for row in range(ROWS):
        random = np.random.default_rng(row)
        logits_V = random.normal(0, 4, VOCAB).astype(np.float32)
        likely = logits_V.argsort()[-12:]
        logits_V -= logits_V[likely].mean()  # penalties differ for logits above and below 0
        *prompt, made = (
            int(t) for t in [*random.choice(likely, 5), *random.choice(VOCAB - 1, 4), random.choice(likely[-3:])]
        )
        forced_V = np.where(np.arange(VOCAB) == made, 1e4, 0).astype(np.float32)
        for seed in range(row * REQUESTS, (row + 1) * REQUESTS):
            engine.submit(Request(prompt, SamplingOptions(2, seed=seed, ignore_eod=True, **options)))
        for logits in (forced_V, logits_V):
            engine._runner = Mock(run=Mock(return_value=torch.from_numpy(logits).expand(REQUESTS, -1)), device="cpu")
            events = engine.step()
        assert len(events) == REQUESTS and not engine.has_work
        draws.append((their_probabilities(logits_V, [*prompt, made], **options), [event.token_id for event in events]))
    assert_drawn_from(draws)
