"""Logits of every runner equal the training forward's, with and without a cache, in every batch, way of serving and attention."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.decode_layers import make_decode_model, options_of_training_alone
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.kv_cache import PageTable, pages_for
from megatron_samoe.inference.rank_runner import RankRunner, convert_weights
from megatron_samoe.inference.serving import Serving, choose_serving, needed_bytes
from megatron_samoe.inference.single_runner import SingleRunner
from megatron_samoe.ops.decode_parts import ExpertStack
from megatron_samoe.runtime.free_memory import free_in_control_groups
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.extension_off import without_extension
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.inference.tiny_models import VOCAB, forward_logits, loaded_tiny, step_logits

TABLE = table(__file__)
MODELS = TABLE["models"] | TABLE["attention"]
WAYS: list[tuple[str, Serving]] = [
    *((name, "folded") for name in MODELS),
    *((name, "on-the-fly") for name in MODELS if name.startswith("samoe")),
    ("samoe gpt3", "selected"),
    ("samoe llama", "selected"),
]
IDS = [[(7 * i * i + 3 * s + 11) % VOCAB for i in range(n)] for s, n in enumerate((37, 5, 20))]


def make(name: str, serving: Serving) -> LoadedModel:
    layout, options = MODELS[name]
    loaded = loaded_tiny(layout, mixing=serving != "selected", **options)
    if serving == "selected":  # one bank each, some of them scaled
        for i, layer in enumerate(loaded.model.moe_layers()):
            layer.moe.experts.coefficients *= 1 + 0.25 * i
        with torch.no_grad():
            loaded.model.begin_step()
    return loaded


def single(
    loaded: LoadedModel, serving: Serving, pages: int, cache_experts: int = 4, dtype: str = "fp32"
) -> SingleRunner:
    model = make_decode_model(loaded.model, serving, dtype, pages)
    return SingleRunner(model, 64, 64, cache_experts)


def tables(lengths: list[int]) -> PageTable:
    pages = PageTable(len(lengths), sum(map(pages_for, lengths)), 3)
    assert [pages.reserve(n) for n in lengths] == list(range(len(lengths)))
    return pages


def new_bytes(loaded: LoadedModel, tensors: Iterable[torch.Tensor]) -> int:
    """Returns the memory of tensors beyond that of the loaded model."""
    before = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    taken = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in taken.items() if place not in before)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


def beyond_the_ops(layout: str, options: dict[str, Any]) -> bool:
    """Returns whether the training model alone decodes a model."""
    return bool(options_of_training_alone(tiny_config(layout, **options).model))


@pytest.mark.parametrize(
    ("name", "serving", "kind"),
    [
        (name, serving, kind)
        for name, serving in WAYS
        for kind in ("compiled", "twins", "ranks")
        if kind == "ranks" or not beyond_the_ops(*MODELS[name])
    ],
)
def test_logits_equal_the_training_forward_at_every_position(
    name: str, serving: Serving, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make(name, serving)
    if kind == "twins":
        without_extension(monkeypatch)
    expected = [forward_logits(loaded, ids) for ids in IDS]
    assert expected[0].std() > 0.1
    pages = tables([len(ids) for ids in IDS])
    runner = (
        RankRunner(loaded, pages.num_pages, serving) if kind == "ranks" else single(loaded, serving, pages.num_pages)
    )
    # Whole prompts without a cache; then with one: a part alone, other batches of parts, single tokens.
    for slot in (0, 1, 2):
        close(step_logits(runner, pages, [(slot, 0, IDS[slot])])[0], expected[slot])
    steps = [
        [(0, 0, 20)],
        [(1, 0, 3), (2, 0, 18)],
        [(2, 18, 1), (0, 20, 1), (1, 3, 1)],
        [(0, 21, 15), (1, 4, 1)],
        [(2, 19, 1), (0, 36, 1)],
    ]
    for step in steps:
        got = step_logits(runner, pages, [(slot, first, IDS[slot][first : first + n]) for slot, first, n in step])
        for (slot, first, n), logits in zip(step, got, strict=True):
            close(logits, expected[slot][first : first + n])
    if serving == "on-the-fly" and isinstance(runner, SingleRunner):
        cache = runner.expert_cache
        assert cache is not None and cache.num_hits > 0 and cache.num_misses > 4


SMALL = ("dense gpt3", "tied", "scaled", "pool", "pyramid residual")


@pytest.mark.parametrize(
    ("name", "serving"), [*((n, "folded") for n in SMALL), *(w for w in WAYS if w[0] == "samoe gpt3")]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.03), ("int8", 0.05)])
def test_small_weights_stay_near(name: str, serving: Serving, dtype: str, tolerance: float) -> None:
    loaded = make(name, serving)
    expected = forward_logits(loaded, IDS[0])
    pages = tables([len(IDS[0])])
    runner = single(loaded, serving, pages.num_pages, 8, dtype)
    got = torch.cat([step_logits(runner, pages, [(0, i, [token])])[0] for i, token in enumerate(IDS[0])])
    # Near on the whole; single tokens may go to other experts.
    error = (got - expected).square().mean(1).sqrt() / expected.std()
    assert 1e-5 < error.median() < tolerance
    again = single(loaded, serving, pages.num_pages, 8, dtype)
    together = step_logits(again, pages, [(0, 0, IDS[0])])[0]
    # Caches and steps change nothing but rounding; what a router chooses differently is rare.
    assert ((together - got).abs().amax(1) < 0.05 * expected.std()).float().mean() > 0.8


def test_bf16_models_are_served_in_their_own_precision() -> None:
    loaded = loaded_tiny("samoe", dtype=torch.bfloat16, style="llama", moe_router_topk=2)
    assert Engine(loaded).dtype == "bf16" and Engine(loaded, dtype="fp32").dtype == "fp32"


def test_weights_convert_and_pools_stay() -> None:
    loaded = loaded_tiny("samoe", style="llama")
    expected = forward_logits(loaded, IDS[1])
    convert_weights(loaded.model, "bf16")
    loaded.model.begin_step()
    kinds = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert {k for n, k in kinds.items() if "router" in n or "pool" in n or "coefficients" in n} == {torch.float32}
    assert kinds["chunks.0.layers.0.attention.qkv.weight"] == torch.bfloat16
    pages = tables([5])
    got = step_logits(RankRunner(loaded, pages.num_pages, "folded"), pages, [(0, 0, IDS[1])])[0]
    assert 0 < (got - expected).square().mean().sqrt() < 0.05 * expected.std()
    with pytest.raises(ConfigError, match="dtype = 'int8': fp32 or bf16"):
        convert_weights(loaded.model, "int8")


def test_auto_takes_selected_then_folded_then_on_the_fly() -> None:
    one_bank, mixed = make("samoe gpt3", "selected"), make("samoe gpt3", "folded")
    assert Engine(one_bank).serving == "selected" and Engine(mixed).serving == "folded"
    assert Engine(make("moe", "folded")).serving == "folded"
    needed = needed_bytes(mixed.model, "fp32", 4, 8)
    assert needed["selected"] < needed["on-the-fly"] < needed["folded"]
    assert choose_serving("auto", mixed.model, needed, needed["folded"]) == "folded"
    assert choose_serving("auto", mixed.model, needed, needed["folded"] - 1) == "on-the-fly"


def test_memory_too_small_is_said_with_the_way_that_fits() -> None:
    mixed = make("samoe gpt3", "folded")
    needed = {"folded": 9_000_000_000, "on-the-fly": 2_000_000_000, "selected": 1_000_000_000}
    message = "folded experts and the key-value cache take 9 GB more memory and 3 GB are free; on-the-fly takes 2 GB"
    with pytest.raises(ConfigError, match=f"{message}; on-the-fly fits"):
        choose_serving("folded", mixed.model, needed, 3_000_000_000)
    with pytest.raises(ConfigError, match="none fits; a smaller precision"):
        choose_serving("auto", mixed.model, needed, 1_500_000_000)


def test_memory_is_looked_at_before_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("samoe gpt3", "folded")
    monkeypatch.setattr("megatron_samoe.inference.engine.free_memory_bytes", lambda device: 100_000)
    monkeypatch.setattr("megatron_samoe.inference.engine.make_decode_model", None)
    with pytest.raises(ConfigError, match="folded experts and the key-value cache take"):
        Engine(loaded, max_batch=1, serving="folded")


def test_memory_that_other_engines_will_take_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("moe", "folded")
    cache = needed_bytes(loaded.model, "fp32", 0, pages_for(loaded.config.model.max_positions))["folded"]
    monkeypatch.setattr("megatron_samoe.inference.engine.free_memory_bytes", lambda device: 2 * cache - 1)
    first = Engine(loaded, max_batch=1)
    assert Engine(loaded, max_batch=1).serving == "folded"
    with pytest.raises(ConfigError, match="and the key-value cache take"):
        Engine(loaded, max_batch=1, beside=[first])


@pytest.mark.parametrize(("line", "top", "names"), TABLE["control groups"])
def test_limits_of_all_groups_around_count(tmp_path: Path, line: str, top: str, names: tuple[str, str, str]) -> None:
    def group(path: str, limit: str, used: int, file: int) -> None:
        folder = tmp_path / top / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 3\n{names[2]} {file}\n")

    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/x\n{line}\n")
    assert list(free_in_control_groups(tmp_path, own)) == []  # a kernel without such groups
    group("job", "1000", 700, 200)
    group("job/step", "max", 300, 100)
    assert list(free_in_control_groups(tmp_path, own)) == [500]  # what was read from files can be given up
    group("job/step", "400", 300, 0)
    assert list(free_in_control_groups(tmp_path, own)) == [100, 500]
    own.write_text(line.replace("/job/step", "/job") + "\n")
    assert list(free_in_control_groups(tmp_path, own)) == [500]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("serving", ["folded", "on-the-fly", "selected"])
def test_needed_bytes_are_those_that_the_weights_take(serving: Serving, dtype: str) -> None:
    loaded = make("samoe gpt3", "selected")
    pages, cache_experts = 5, 8
    runner = single(loaded, serving, pages, cache_experts, dtype)
    tensors = runner._model.weights()
    if runner.expert_cache is not None:
        cache = runner.expert_cache
        tensors += [t for w in (cache._stack.w1, cache._stack.w2) for t in (w.data, w.scale) if t is not None]
    planned = needed_bytes(loaded.model, dtype, cache_experts, pages)[serving]
    # Biases, norms and scales are kept in fp32 whatever the precision of matrices.
    assert abs(new_bytes(loaded, tensors) - planned) < 0.2 * planned + 40_000


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "sets"), [("tied", 3), ("tied sets", 2), ("scaled", 2), ("pool", 1), ("residual pool", 1)]
)
def test_shared_sets_are_in_memory_once(name: str, sets: int, dtype: str) -> None:
    loaded = make(name, "folded")
    model = make_decode_model(loaded.model, "folded", dtype, 5)
    stacks = [layer.experts for layer in model.layers if layer.routing is not None]
    matrices = {w.data.data_ptr(): w.num_bytes for e in stacks if isinstance(e, ExpertStack) for w in (e.w1, e.w2)}
    assert len(matrices) == 2 * sets and len(stacks) >= sets
    owned = [p for n, p in loaded.model.named_parameters() if n.endswith((".w1", ".w2"))]
    width = {"fp32": 4, "bf16": 2, "int8": 1}[dtype]
    scales = 4 * sum(p.numel() // p.shape[-1] for p in owned) if dtype == "int8" else 0
    assert sum(matrices.values()) == width * sum(p.numel() for p in owned) + scales
    planned = needed_bytes(loaded.model, dtype, 0, 5)["folded"]
    assert abs(new_bytes(loaded, model.weights()) - planned) < 0.2 * planned + 40_000


def test_missing_ways_are_refused() -> None:
    moe, mixed, almost_selected = make("moe", "folded"), make("samoe gpt3", "folded"), make("samoe llama", "selected")
    almost_selected.model.moe_layers()[2].moe.experts.coefficients[1, 3] = torch.tensor([0.1, 1.0])
    asked: list[tuple[LoadedModel, dict[str, Any], str]] = [
        (moe, {"serving": "on-the-fly"}, "serving = 'on-the-fly': the checkpoint is a moe model without a shared pool"),
        (almost_selected, {"serving": "selected"}, "some layer of the checkpoint combines several banks"),
        (mixed, {"cache_experts": 3}, "cache_experts = 3: must be 4 or more"),
        (mixed, {"serving": "folded", "cache_experts": 8}, "cache_experts = 8: has no effect on"),
        (moe, {"dtype": "fp8"}, "dtype = 'fp8'"),
    ]
    for loaded, options, said in asked:
        with pytest.raises(ConfigError, match=said):
            Engine(loaded, **options)
