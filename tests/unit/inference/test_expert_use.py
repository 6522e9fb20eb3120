"""Which experts a text's tokens use: the router's own choices, by the function, the server and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.expert_use import expert_use
from megatron_samoe.moe.sharing.coefficients import Coefficients
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import load_tiny, save_tiny, serving


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_tiny(save_tiny(tmp_path_factory.mktemp("model"), seq_length=64, moe_router_topk=2))


def test_choices_are_those_of_the_first_layers_router(loaded: LoadedModel) -> None:
    """Two texts that begin alike use the same experts as long as they do; weights are the router's, banks the layer's."""
    one, other = (expert_use(loaded.model, ids) for ids in ([5, 9, 2, 7], [5, 9, 2, 1]))
    assert len(one) == len(loaded.model.moe_layers())
    for layer, (a, b) in zip(loaded.model.moe_layers(), zip(one, other, strict=True), strict=True):
        assert a.layer == layer.index and a.num_experts == layer.moe.shape.num_experts
        assert a.experts_TK[:3] == b.experts_TK[:3] and len(a.experts_TK) == 4
        assert all(len(set(token)) == 2 and set(token) <= set(range(a.num_experts)) for token in a.experts_TK)
        assert all(sum(token) == pytest.approx(1.0, abs=1e-3) for token in a.weights_TK)
        (coefficients,) = (m for m in layer.moe.modules() if isinstance(m, Coefficients))
        assert a.source == "combined"
        assert a.banks == pytest.approx(coefficients.coefficients.mean((0, 1)).tolist(), abs=1e-5)
    assert any(a.experts_TK[3] != b.experts_TK[3] for a, b in zip(one, other, strict=True))


def test_shared_sets_are_named_and_dense_models_have_none(tmp_path: Path) -> None:
    tied = load_tiny(save_tiny(tmp_path / "tied", "moe", expert_sharing="tied", num_expert_sets=1))
    assert {use.source for use in expert_use(tied.model, [1, 2])} == {"tied 0"}
    assert expert_use(load_tiny(save_tiny(tmp_path / "dense", "dense")).model, [1, 2]) == []


@pytest.mark.parametrize("length", [0, 65])
def test_texts_of_no_length_or_too_long_are_refused(length: int, loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="must have 1 to 64 tokens"):
        expert_use(loaded.model, [1] * length)


def test_the_server_tells_it(loaded: LoadedModel) -> None:
    with serving(loaded, show_experts=True) as running:
        assert running.client.ask("GET", "/v1/models").json["data"][0]["shows_experts"]
        found = running.client.ask("POST", "/v1/experts", {"prompt": "Hello"}).json
        uses = expert_use(loaded.model, loaded.tokenizer.encode("Hello"))
        assert "".join(found["tokens"]) == "Hello"
        assert [layer["experts"] for layer in found["layers"]] == [use.experts_TK for use in uses]
        for body, said in (
            ({}, "prompt is missing"),
            ({"prompt": ["a", "b"]}, "one is shown at a time"),
            ({"prompt": "a", "n": 2}, "not a field of such a request"),
            ({"prompt": "a" * 65}, "the model's context is 64"),
            ({"prompt": "a", "model": "another"}, "another"),
        ):
            answer = running.client.ask("POST", "/v1/experts", body)
            assert answer.status in (400, 404) and said in answer.json["error"]["message"], body
    with serving(loaded) as running:
        assert not running.client.ask("GET", "/v1/models").json["data"][0]["shows_experts"]
        answer = running.client.ask("POST", "/v1/experts", {"prompt": "Hello"})
        assert answer.status == 404 and "without --show-experts" in answer.json["error"]["message"]
