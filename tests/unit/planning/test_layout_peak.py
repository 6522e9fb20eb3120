"""The peak of a step with sequence parallelism, ZeRO-1 and Muon, on tensors without storage, against the planner's formula."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_samoe.config import PretrainConfig
from megatron_samoe.planning.memory import rank_memory
from tests.harness.storageless import step_peak
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout

TABLE = table(__file__)
VOCAB_SIZE = 1024
MODELS: dict[str, dict[str, Any]] = TABLE["models"]
#: Ranks, and how they are laid out.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = TABLE["layouts"]


def config_in(layout: str, model: str, **options: Any) -> tuple[PretrainConfig, int]:
    """Returns the configuration of a model whose weights and activations both count, and the number of ranks."""
    world, sizes = LAYOUTS[layout]
    if model == "dense":
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    config = tiny_config(
        **{"style": "gpt3", "num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 2048, "num_attention_heads": 8,
           "seq_length": 1024, "micro_batch_size": 2, "global_batch_size": 2 * world, "num_experts": 8, "moe_router_topk": 2,
           "bf16": True, **MODELS[model], **options}
    )  # fmt: skip
    return with_layout(config, **sizes), world


def peak_of(layout: str, model: str, optimizer: str) -> tuple[int, int, int]:
    """Returns what `step_peak` does."""
    config, world = config_in(layout, model, optimizer=optimizer)
    return step_peak(config, VOCAB_SIZE, world)


CASES = TABLE["cases"]


@pytest.mark.parametrize(("layout", "model", "optimizer"), CASES)
def test_the_formula_holds_in_layouts(layout: str, model: str, optimizer: str) -> None:
    measured, planned, before = peak_of(layout, model, optimizer)
    assert measured == pytest.approx(planned, rel=0.01), (measured / 2**20, planned / 2**20)
    config, world = config_in(layout, model, optimizer=optimizer)
    parts = rank_memory(config, VOCAB_SIZE, world)
    assert before == pytest.approx(parts.weights + parts.gradients + parts.optimizer, rel=1e-2)


def test_each_of_them_saves_what_it_should() -> None:
    """Of a dense model: sequence parallelism of activations, ZeRO-1 and Muon of what is held before the step."""
    found = {
        name: peak_of(layout, "dense", optimizer)
        for name, layout, optimizer in (("tp", "tp4", "adam"), ("sp", "tp4 sp", "adam"), ("one", "one", "adam"),
                                        ("zero", "zero dp4", "adam"), ("muon", "one", "muon"))
    }  # fmt: skip
    added = {name: peak - before for name, (peak, _, before) in found.items()}
    held = {name: before for name, (*_, before) in found.items()}
    assert added["sp"] < 0.8 * added["tp"] and held["sp"] == held["tp"]
    # 2 + 4 + 12 bytes for a parameter, of which ZeRO-1 leaves 3 of the 12, and Muon 8 of a matrix.
    assert held["zero"] == pytest.approx(held["one"] * 9 / 18, rel=0.01)
    assert held["muon"] == pytest.approx(held["one"] * 14 / 18, rel=0.02)
