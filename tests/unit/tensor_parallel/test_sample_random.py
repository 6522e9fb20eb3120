"""Noise belongs to a sample, not to the batch it is in."""

from __future__ import annotations

import pytest
import torch

from megatron_samoe.parallel_state.token_share import TokenShare
from megatron_samoe.tensor_parallel.random import SampleRandom, derived_seed

CPU = torch.device("cpu")


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
