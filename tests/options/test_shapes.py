"""Shapes of a model's weights, by options: as they follow by hand from `shapes.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.checkpointing import model_state
from megatron_samoe.training.setup import build_setup
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config

SHAPES = table(str(Path(__file__).with_name("shapes.py")))


@pytest.mark.parametrize("option", SHAPES)
def test_a_weight_has_the_shape_that_an_option_says(option: str) -> None:
    value, others, weight, shape = SHAPES[option]
    config = tiny_config(**{"layout": "dense", **others, option: value})
    model = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel)).model
    shapes = {name: tuple(parts[0].global_shape) for name, parts in model_state(model).items()}
    assert shapes.get(weight) == shape, shapes
    assert max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")) == config.model.num_layers - 1
