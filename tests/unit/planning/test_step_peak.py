"""The peak memory of a training step by a GPU's algorithms, on tensors without storage, against the planner's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import from_mapping, read_yaml
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from tests.harness.live_memory import LiveMemory
from tests.harness.storageless import step_peak
from tests.harness.tiny import with_options

CONFIG = Path(__file__).resolve().parents[3] / "examples/configs/gpt_1.3b_samoe128.yaml"
VOCAB_SIZE, WORLD = 50257, 32


def config_of_samoe(**options: object) -> PretrainConfig:
    return with_options(from_mapping(read_yaml(CONFIG), CONFIG.name), **options)


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
