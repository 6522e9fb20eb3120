"""Stretched rotary angles against transformers' own, and by what they must keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_samoe.config import ModelConfig
from megatron_samoe.models.rotary import rotary_tables, scaled_frequencies
from tests.harness.tables import table
from tests.parity.hf_models import transformers

pytestmark = pytest.mark.parity
TABLE = table(__file__)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = TABLE["cases"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("head_dim", "base"), [(128, 500000.0), (64, 10000.0), (8, 1e6)])
def test_frequencies_are_those_of_transformers(case: str, head_dim: int, base: float) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (ours, theirs), kind = CASES[case], case.split()[0]
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4}
    rope = {"rope_type": kind, "rope_theta": base, **theirs}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=65536, rope_parameters=rope)
    model = ModelConfig(**sizes, position_embedding_type="rope", rotary_base=base, rope_scaling_type=kind, **ours)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    found, own_factor = scaled_frequencies(model)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert own_factor == pytest.approx(factor)


def test_a_factor_of_yarn_is_on_both_tables() -> None:
    yarn = {"rope_scaling_type": "yarn", "rope_scaling_factor": math.e, "rope_original_max_positions": 64}
    model = ModelConfig(hidden_size=32, num_attention_heads=4, position_embedding_type="rope", **yarn)
    cos, sin = rotary_tables(model, torch.arange(100)[None], torch.float32)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.1**2))
