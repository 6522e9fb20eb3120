"""The peak memory of a training step by a GPU's algorithms, on tensors without storage, against the planner's formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import from_mapping, read_yaml
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.planning.memory import rank_memory
from tests.harness.live_memory import LiveMemory
from tests.harness.pairs import first_by_day
from tests.harness.storageless import step_peak
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout, with_options

CONFIG = Path(__file__).resolve().parents[3] / "examples/configs/gpt_1.3b_samoe128.yaml"
VOCAB_SIZE, WORLD = 50257, 32
TABLE = table(__file__)
MODELS: dict[str, dict[str, Any]] = TABLE["models"]
#: Ranks, and how they are laid out.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = TABLE["layouts"]
#: Vocabulary and width of the models in layouts and of long sequences, which have this length.
SMALL_VOCABULARY, HIDDEN, LENGTH = 1024, 256, 32768


def config_of_samoe(**options: object) -> PretrainConfig:
    return with_options(from_mapping(read_yaml(CONFIG), CONFIG.name), **options)


def sized_config(model: str, width: int, **options: Any) -> PretrainConfig:
    """Returns a model of the table whose weights and activations both count."""
    sizes = {"hidden_size": width, "ffn_hidden_size": 4 * width, "num_attention_heads": 8, "num_experts": 8}
    given = {"style": "gpt3", **sizes, "moe_router_topk": 2, "bf16": True, **MODELS[model], **options}
    return tiny_config(**given)


def peak_in_layout(layout: str, model: str, optimizer: str) -> tuple[int, int, int, int]:
    """Returns what `step_peak` does, and the planned bytes before the step."""
    world, sizes = LAYOUTS[layout]
    if model == "dense":
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    batch = {"seq_length": 1024, "micro_batch_size": 2, "global_batch_size": 2 * world}
    config = with_layout(sized_config(model, 512, num_layers=8, optimizer=optimizer, **batch), **sizes)
    parts = rank_memory(config, SMALL_VOCABULARY, world)
    return *step_peak(config, SMALL_VOCABULARY, world), parts.weights + parts.gradients + parts.optimizer


def long_peak(cp: int, model: str, comm_type: str = "p2p") -> tuple[int, int, int]:
    """Returns what `step_peak` does for one sequence of 32,768 tokens over context-parallel ranks."""
    config = sized_config(model, HIDDEN, num_layers=4, seq_length=LENGTH, micro_batch_size=1, global_batch_size=1)
    return step_peak(with_options(with_layout(config, cp=cp), cp_comm_type=comm_type), SMALL_VOCABULARY, cp)


def test_a_step_of_samoe_128_needs_what_the_formula_says() -> None:
    """1.3 B with 128 experts in 12 layers, 4 of each on a rank; least where each layer combines its experts as it runs."""
    peaks = {}
    for when in ("step", "layer"):
        config = config_of_samoe(samoe_combine=when, global_batch_size=4 * WORLD)
        peaks[when], planned, _ = step_peak(config, VOCAB_SIZE, WORLD)
        assert peaks[when] == pytest.approx(planned, rel=0.01), (when, peaks[when] / 2**30, planned / 2**30)
    assert peaks["layer"] < 0.9 * peaks["step"], peaks


def test_no_logits_are_kept_where_the_loss_makes_them() -> None:
    """Micro-batches of 8,192 tokens and 150,784 words: logits and their gradient would be 11 GB."""
    sizes = {"global_batch_size": 4 * WORLD, "micro_batch_size": 4, "num_layers": 4, "num_experts": 32}
    peaks = []
    for fused in (False, True):
        config = config_of_samoe(**sizes, fused_linear_cross_entropy=fused)
        measured, planned, _ = step_peak(config, 3 * VOCAB_SIZE, WORLD)
        assert measured == pytest.approx(planned, rel=0.01), (measured / 2**30, planned / 2**30)
        peaks.append(measured)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize(("layout", "model", "optimizer"), TABLE["cases"])
def test_the_formula_holds_in_layouts(layout: str, model: str, optimizer: str) -> None:
    measured, planned, before, planned_before = peak_in_layout(layout, model, optimizer)
    assert measured == pytest.approx(planned, rel=0.01), (measured / 2**20, planned / 2**20)
    assert before == pytest.approx(planned_before, rel=1e-2)


def test_each_of_them_saves_what_it_should() -> None:
    """Of a dense model: sequence parallelism of activations, ZeRO-1 and Muon of what is held before the step."""
    asked = {"tp": "tp4", "sp": "tp4 sp", "one": "one", "zero": "zero dp4", "muon": "one"}
    found = {
        name: peak_in_layout(layout, "dense", "muon" if name == "muon" else "adam") for name, layout in asked.items()
    }
    added = {name: peak - before for name, (peak, _, before, _) in found.items()}
    held = {name: before for name, (_, _, before, _) in found.items()}
    assert added["sp"] < 0.8 * added["tp"] and held["sp"] == held["tp"]
    # 2 + 4 + 12 bytes for a parameter, of which ZeRO-1 leaves 3 of the 12, and Muon 8 of a matrix.
    assert held["zero"] == pytest.approx(held["one"] * 9 / 18, rel=0.01)
    assert held["muon"] == pytest.approx(held["one"] * 14 / 18, rel=0.02)


@pytest.mark.parametrize("comm_type", ["p2p", "a2a"])
@pytest.mark.parametrize("model", first_by_day(MODELS, 2))
def test_the_formula_holds_over_context_parallel_ranks(model: str, comm_type: str) -> None:
    """And what a step of a dense model adds to what is held before falls as the number of ranks."""
    added = {}
    for cp in (1, 2, 4, 8):
        measured, planned, before = long_peak(cp, model, comm_type)
        assert measured == pytest.approx(planned, rel=0.01), (cp, measured / 2**20, planned / 2**20)
        added[cp] = (measured - before) * cp
    if model == "dense":
        assert all(size == pytest.approx(added[1], rel=0.05) for size in added.values()), added


@pytest.mark.parametrize("model", MODELS)
def test_no_tensor_of_a_step_has_a_number_for_each_pair_of_tokens(model: str) -> None:
    with LiveMemory() as memory:
        long_peak(1, model)
    assert LENGTH * HIDDEN <= memory.largest_elements < LENGTH * LENGTH // 8


def test_combining_holds_no_copy_of_the_weights() -> None:
    """The pool of a model of 24 layers with 64 experts of 2048 x 1408: 9 GB of weights in bf16 a tensor."""
    layers, banks, elements = 24, 6, 64 * 2048 * 1408
    a = torch.empty(layers, 1, banks, device="meta")
    pool = torch.empty(banks, 1, elements, device="meta")
    pool_grad, grads = torch.empty_like(pool), torch.empty(layers, 1, elements, device="meta")
    weights = torch.empty(layers, 1, elements, dtype=torch.bfloat16, device="meta")
    held = [a, pool, pool_grad, grads, weights]
    with LiveMemory(held=held) as memory:
        at_rest = memory.peak
        combine_banks(a, pool, weights)
        combine_banks_backward(a, pool, grads, pool_grad)
    assert memory.peak - at_rest < 0.02 * weights.nbytes
