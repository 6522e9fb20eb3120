"""What is a GPU's of ops, bits, streams, and what stops them; and whole training steps against the CPU's references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.ops.combine import combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_parts
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from megatron_samoe.runtime import reference_checks
from tests.harness.extension_off import without_extension
from tests.harness.layout_training import MODELS, assert_same, layout_config, train
from tests.harness.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


def _results(device: str) -> list[Tensor]:
    """Sums of floats of every kind that the ops make, for equal inputs."""
    generator = torch.Generator().manual_seed(3)
    logits_TE, x_TH, dy_TH = (torch.randn(700, n, generator=generator).to(device) for n in (24, 96, 96))
    gate = topk_gate(logits_TE.requires_grad_(), 2, num_sequences=7)
    permutation = make_permutation(gate.ids_TK, 24)
    y_TH = unpermute(permute(x_TH.requires_grad_(), permutation), gate.probs_TK, permutation)
    gradients = torch.autograd.grad(
        (y_TH * dy_TH).sum() + gate.z_sum + gate.score_sum_GE.square().sum(), (logits_TE, x_TH)
    )
    banks = [t.to(device) for t in reference_checks.combine_inputs(12, 3, 4, 5000)]
    dbanks_PGN = torch.zeros_like(banks[1])
    dcoefficients_LGP = combine_banks_backward(*banks, dbanks_PGN)
    parts = cross_entropy_parts(torch.randn(50, 4099, generator=generator).to(device), gate.ids_TK[:50, 0])
    return [t.detach() for t in (y_TH, *gradients, dcoefficients_LGP, dbanks_PGN, gate.z_sum, *parts)]


def test_equal_inputs_give_equal_bits(device: str) -> None:
    for first, second in zip(_results(device), _results(device), strict=True):
        assert torch.equal(first, second)


def test_ops_run_on_the_current_stream(device: str) -> None:
    """The input is written late on a stream of its own; an op that ran on another would read what was there before."""
    module = torch.get_device_module(device)
    logits_TE = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    expected = topk_gate(logits_TE, 8)
    late_TE, source_TE = torch.zeros(logits_TE.shape, device=device), logits_TE.to(device)
    module.synchronize()
    with module.stream(module.Stream()):
        if device == "cuda":
            torch.cuda._sleep(100_000_000)  # clock cycles
        late_TE.copy_(source_TE)
        gate = topk_gate(late_TE, 8)
        moved_NH = permute(late_TE, make_permutation(gate.ids_TK, 64))
        ids_TK, probs_TK, sum_H = gate.ids_TK.cpu(), gate.probs_TK.cpu(), moved_NH.sum(0).cpu()
    assert torch.equal(ids_TK, expected.ids_TK)
    torch.testing.assert_close(probs_TK, expected.probs_TK)
    torch.testing.assert_close(sum_H, 8 * logits_TE.sum(0), rtol=1e-4, atol=1e-3)


def _read_foreign_row(device: str) -> None:
    assert extension.load()
    rows = torch.ops.megatron_samoe.permute(torch.zeros(4, 8, device=device), torch.tensor([0, 9]).to(device), 1)
    torch.get_device_module(device).synchronize()
    print(rows)


def test_an_index_that_names_no_row_stops_the_op(device: str) -> None:
    """In a process of its own: on a GPU nothing else can run after it."""
    with pytest.raises(RankFailure, match="outside 0 to 3" if device == "cpu" else "assert"):
        run_ranks(_read_foreign_row, 1, device)


def test_tensors_of_two_devices_are_refused(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs two devices")
    with pytest.raises(RuntimeError, match="is on cpu"):
        torch.ops.megatron_samoe.permute(torch.zeros(4, 8, device=device), torch.zeros(3, dtype=torch.int64), 1)


# The GPU adds matrix products in another order than the CPU.
RTOL = 1e-4


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a function on the CPU without the compiled ops."""

    def run(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            without_extension(patch)
            return function(*args, device="cpu")

    return run


@pytest.mark.parametrize(
    "model", ["dense", "samoe step", "samoe layer", "moe top2 llama", "samoe many banks per expert"]
)
def test_training_steps(model: str, device: str, twins: Any) -> None:
    """Losses, norms and the first step's gradients; then the weights that the optimizer made of them."""
    assert model in MODELS
    config = layout_config("one process", model)
    got = train(config, torch.float32, 3, device=device)
    expected = twins(train, config, torch.float32, 3)
    assert_same(got, expected, rtol=RTOL)
    for name, weight in expected["weights"].items():
        # AdamW's first steps are the size of the rate whatever the gradient's: some are of rounding errors alone.
        close = torch.isclose(got["weights"][name], weight, rtol=RTOL, atol=1e-5)
        assert close.float().mean() > 0.99, name
