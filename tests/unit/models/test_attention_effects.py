"""Options of attention and of layers change what a model computes, and what they learn has gradients.

That each trains in every layout as in one process is the parity table's matter.
"""

from __future__ import annotations

import pytest
import torch

from tests.harness.layout_training import MODELS, train
from tests.harness.tiny import tiny_config

#: The models of the parity table that differ from others in such options, and whether these learn something.
LEARN = dict.fromkeys(("sinks and cap", "olmoe", "all of attention", "latent", "latent plain"), True)
LEARN |= dict.fromkeys(("window", "granite", "neox", "off by one"), False)


@pytest.mark.parametrize("model", LEARN)
def test_each_has_an_effect_and_trains(model: str) -> None:
    kept = ("layout", "style", "init_method_std", "moe_router_topk", "optimizer", "lr")
    plain = train(tiny_config(**{k: v for k, v in MODELS[model].items() if k in kept}), torch.float64, steps=1)
    found = train(tiny_config(**MODELS[model]), torch.float64, steps=1)
    assert found["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-6)
    learned = [n for n in found["gradients"] if n.endswith(".sinks") or "q_norm" in n or "kv_norm" in n]
    assert bool(learned) == LEARN[model]
    assert all(found["gradients"][n].abs().min() > 0 for n in learned)
