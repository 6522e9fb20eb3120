"""Noise belongs to a sample, not to the batch it is in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.parallel_state.token_share import TokenShare
from megatron_samoe.tensor_parallel.random import SampleRandom, derived_seed, recompute

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True), st.data())
def test_mask_of_a_sample_does_not_depend_on_its_batch(samples: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(samples)))
    x = torch.ones(len(samples) * 3, 5)
    whole = SampleRandom(1, 2, tuple(samples)).dropout(x, 0.4, 3, "here")
    parts = [
        SampleRandom(1, 2, tuple(group)).dropout(x[: len(group) * 3], 0.4, 3, "here")
        for group in (samples[:cut], samples[cut:])
        if group
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("block", [1, 3, 8, 2048])
def test_a_share_of_tokens_draws_what_the_whole_has_there(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_samoe.tensor_parallel.random.BLOCK", block)
    random, x = SampleRandom(1, 2, (7, 8)), torch.ones(2 * 24, 5)
    whole = random.uniform_like(x, 3, "here", TokenShare()).view(2, 24, 5)
    assert len(whole.unique()) == whole.numel(), "no block repeats another"
    for context, tensor in ((1, 2), (2, 1), (2, 2), (3, 4)):
        shares = [TokenShare((c, context), (t, tensor)) for c in range(context) for t in range(tensor)]
        for share in shares:
            own = random.uniform_like(x[: 2 * 24 // share.num_shares], 3, "here", share)
            expected = share.of_sequences(whole).flatten(0, 1).chunk(tensor)[share.tensor[0]]
            assert torch.equal(own, expected)


def test_mask_depends_on_seed_iteration_sample_layer_and_site() -> None:
    one = {"seed": 1, "iteration": 2, "sample": 3, "layer": 4, "site": "a"}
    draws = [
        SampleRandom(p["seed"], p["iteration"], (p["sample"],)).uniform((64,), CPU, p["layer"], p["site"])
        for p in (one, *({**one, name: "b" if name == "site" else 0} for name in one))
    ]
    for i, draw in enumerate(draws):
        assert all(not torch.equal(draw, other) for other in draws[:i])
    assert torch.equal(draws[0], SampleRandom(1, 2, (3,)).uniform((64,), CPU, 4, "a"))


def test_draws_are_uniform_and_leave_torchs_generator_alone() -> None:
    before, random = torch.get_rng_state(), SampleRandom(0, 0, tuple(range(50)))
    draws = random.uniform((2000,), CPU, 0, "x")
    assert draws.dtype == torch.float32 and 0 <= draws.min() and draws.max() < 1
    assert ((torch.histc(draws, bins=20, min=0, max=1) - 5000).abs() < 400).all()
    x = torch.ones(50 * 40, 50)
    y = random.dropout(x, 0.3, 0, "x")
    assert abs((y == 0).double().mean().item() - 0.3) < 0.01
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert random.dropout(x, 0.0, 0, "x") is x
    assert torch.equal(before, torch.get_rng_state())


def test_a_seed_is_the_same_in_every_process() -> None:
    """Python's own hash() of strings would differ, and resumed runs change their noise."""
    assert derived_seed(1234, "layers.0.mlp.fc1.weight") == derived_seed("1234/layers.0.mlp.fc1.weight")
    assert derived_seed(0, 0, 0, 0, "attention0") != derived_seed(0, 0, 0, 0, "attention1")


def test_recomputation_meets_the_same_mask_and_gives_the_same_gradient() -> None:
    random = SampleRandom(0, 0, (0, 1))
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    runs = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return random.dropout((x @ weight).tanh(), 0.5, 0, "x")

    x = torch.randn(6, 4, dtype=torch.float64)
    gradients = []
    for run in (lambda: layer(x), lambda: recompute(layer, x)):
        (gradient,) = torch.autograd.grad(run().square().sum(), weight)
        gradients.append(gradient)
    assert torch.equal(*gradients) and len(runs) == 3
