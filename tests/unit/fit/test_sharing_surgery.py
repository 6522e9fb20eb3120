"""Folding, tying, pooling, selecting and thinning models that share experts in any way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.derived import sharing_map
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.sharing_map import parse_sharing, written_map
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.hf.export import differences
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.fit.surgery.pool import SetOptions, pool_moe, tie_layers
from megatron_samoe.fit.surgery.select import tie_selected
from megatron_samoe.fit.surgery.student import keep_layers
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import MemorySource, logits, new_source

TABLE = table(__file__)
NORM: dict[str, Any] = {"moe_router_score_function": "norm", "moe_router_topk": 2}
SHARED: dict[str, dict[str, Any]] = TABLE["shared"]


def made(**options: Any) -> MemorySource:
    return new_source(tiny_config("moe", **options))


def moe_of(source: GlobalTensors) -> MoEConfig:
    return from_mapping(source.config, "test").moe


def in_memory(source: GlobalTensors) -> MemorySource:
    return MemorySource({name: source.read(name) for name in source.tensors}, source.config, source.train_state)


def assert_same(a: GlobalTensors, b: GlobalTensors, tolerance: float = 1e-5) -> None:
    expected = logits(b)
    assert expected.std() > 0.1 and differences(a) == []
    torch.testing.assert_close(logits(a), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "text", ["own", "combined", "0,1,1,2", "own,0*3", "scaled:0,0,1,1", "own,combined*2,own", "2,0,0,1"]
)
def test_a_map_that_is_written_is_read_back(text: str) -> None:
    sources = parse_sharing(text, 4)
    assert parse_sharing(written_map(sources), 4) == sources


@pytest.mark.parametrize("case", SHARED)
def test_folding_any_way_changes_no_logit(case: str) -> None:
    source = made(**SHARED[case])
    folded = fold_shared(source)
    assert not moe_of(folded).shares_experts and moe_of(folded).expert_layout == "moe"
    assert_same(folded, source)
    assert_same(keep_layers(source, range(from_mapping(source.config, "").model.num_layers)), source)


@pytest.mark.parametrize("case", SHARED)
def test_what_is_tied_already_is_tied_again_without_loss(case: str) -> None:
    source = made(**SHARED[case])
    moe = moe_of(source)
    if moe.has_pool:
        return
    options = SetOptions(moe.num_expert_sets, moe.untied_ends)
    if case == "neighbours":
        options, moe = SetOptions(), replace(moe, expert_sharing="0,0,1,1,own")
    again = tie_layers(source, moe.sharing, options)
    assert sharing_map(from_mapping(again.config, "")) == sharing_map(from_mapping(source.config, ""))
    assert_same(again, source, 1e-4)


def renumbered(source: MemorySource, layer: int, order: list[int]) -> MemorySource:
    """Renumbers a layer's experts, which changes nothing."""
    weights = dict(source.weights)
    for name in weights:
        if name.startswith((f"layers.{layer}.moe.experts.", f"layers.{layer}.moe.router.")) and not name.endswith(
            ".scale"
        ):
            weights[name] = weights[name][order]
    return replace(source, weights=weights)


def test_experts_under_other_numbers_are_found_before_tying() -> None:
    folded = in_memory(fold_shared(made(expert_sharing="tied", **NORM)))
    mixed = renumbered(renumbered(folded, 1, [2, 0, 3, 1]), 3, [3, 2, 1, 0])
    for sets_from in (None, (0,), (3,)):
        tied = tie_layers(mixed, "tied", SetOptions(layers=sets_from))
        assert [line.split()[1] for line in tied.report[2:6]] == (
            ["0", "4", "0", "4"] if sets_from != (3,) else ["4", "4", "4", "0"]
        )
        assert_same(tied, folded, 1e-4)


@pytest.mark.parametrize("sets_from", [None, (1, 3)])
@pytest.mark.parametrize("prefix", ["", "scaled:"])
def test_tying_loses_what_is_reported(prefix: str, sets_from: tuple[int, ...] | None) -> None:
    source = made()
    tied = tie_layers(source, f"{prefix}0,0,1,1", SetOptions(layers=sets_from))
    assert differences(tied) == []
    again, rows = fold_shared(tied), [line.split() for line in tied.report if line.split()[0].isdigit()]
    for layer, row in enumerate(rows):
        router = source.weights[f"layers.{layer}.moe.router.weight"]
        order = torch.cdist(again.read(f"layers.{layer}.moe.router.weight"), router).argmin(1)
        for column, kinds in ((2, ("w1", "b1")), (3, ("w2", "b2"))):
            names = [f"layers.{layer}.moe.experts.{kind}" for kind in kinds]
            before = torch.cat([source.weights[name][order].flatten() for name in names])
            after = torch.cat([again.read(name).flatten() for name in names])
            assert float(row[column]) == pytest.approx(
                float((before - after).norm() / before.norm()), rel=0.01, abs=1e-6
            )
    lost = [float(row[2]) for row in rows]
    if sets_from:
        assert lost[1] < 1e-6 and lost[3] < 1e-6 and min(lost[0], lost[2]) > 0.1
    elif not prefix:
        average = tie_layers(source, "0,0,1,1").read("expert_pool.set.1.w2")
        assert average.shape[0] == 1 and min(lost) > 0.1


def test_pooling_by_a_map_leaves_other_layers_alone() -> None:
    source = made(num_layers=6)
    pooled = pool_moe(source, 4, sharing="own,combined*4,own")
    assert pooled.tensors["expert_pool.bank.w1"].shape[0] == 4 and "layers.0.moe.experts.w1" in pooled.tensors
    assert torch.equal(pooled.read("layers.3.moe.combination"), torch.eye(4)[2].expand(2, 1, 4)), "a bank each"
    assert_same(pooled, source)
    with pytest.raises(ConfigError, match="number of MoE layers that combine them, 4"):
        pool_moe(source, 5, sharing="own,combined*4,own")


def one_hot(source: MemorySource, rows: dict[int, list[list[float]]]) -> MemorySource:
    weights = dict(source.weights)
    for layer, row in rows.items():
        weights[f"layers.{layer}.moe.combination"] = torch.tensor(row)[:, None]
    return replace(source, weights=weights)


def test_selected_banks_become_sets() -> None:
    banks = {0: [1.0, 0, 0], 1: [0, 0, 1.0], 2: [1.0, 0, 0], 3: [0, 1.0, 0]}
    rows = {layer: [row, row] for layer, row in banks.items()}
    source = one_hot(new_source(tiny_config("samoe", num_expert_banks=3)), rows)
    selected = tie_selected(source, "one")
    assert moe_of(selected).expert_sharing == "0,own,0,own" and "expert_pool.bank.w1" not in selected.tensors
    assert torch.equal(selected.read("expert_pool.set.0.w1")[0], source.weights["expert_pool.bank.w1"][0])
    assert torch.equal(selected.read("layers.1.moe.experts.w1"), source.weights["expert_pool.bank.w1"][2])
    assert_same(selected, source, 1e-6)


@pytest.mark.parametrize("options", [{"samoe_granularity": "expert"}, {"samoe_normalization": "l2"}])
def test_selecting_ends_with_banks_as_they_are(options: dict[str, Any]) -> None:
    source = new_source(tiny_config("samoe", **options), spread=0.3)
    selected = tie_selected(source, "one")
    assert {way.name for way in moe_of(selected).ways} <= {"own", "tied"} and differences(selected) == []
    assert not any(name.endswith(".combination") for name in selected.tensors)
    folded, before = fold_shared(selected) if moe_of(selected).shares_experts else selected, fold_shared(source)
    for line in selected.report[2:6]:
        layer, bank, one, w1, same_bank, also_one, w2 = line.split()
        assert bank == same_bank and one == also_one == "1.0000"
        for kind, reported in (("w1", w1), ("w2", w2)):
            name = f"layers.{layer}.moe.experts.{kind}"
            assert torch.equal(folded.read(name), source.weights[f"expert_pool.bank.{kind}"][int(bank)])
            change = (folded.read(name) - before.read(name)).norm() / before.read(name).norm()
            assert float(change) == pytest.approx(float(reported), rel=0.1, abs=0.01)


def scaled(w1: float, factors: list[float], **options: Any) -> MemorySource:
    rows = {layer: [[w1], [factor]] for layer, factor in enumerate(factors)}
    return one_hot(made(expert_sharing="scaled", **options), rows)


def test_factors_on_w2_move_into_routing_where_it_can_hold_them() -> None:
    differ, same = [1.0, 0.5, 2.0, 1.5], [1.25] * 4
    for source in (
        scaled(1.0, differ, **NORM, moe_router_enable_expert_bias=True),
        scaled(1.0, same),
        scaled(1.0, differ, moe_router_score_function="relu"),
        scaled(1.0, same, moe_router_score_function="sigmoid", moe_router_topk=2, moe_router_topk_scaling_factor=2.0),
    ):
        assert_same(tie_selected(source, "keep"), source)
    with pytest.raises(ConfigError, match=r"0.5000 to 2.0000 .* norm or relu"):
        tie_selected(scaled(1.0, differ), "keep")
    with pytest.raises(ConfigError, match="weights of routing are positive"):
        tie_selected(scaled(1.0, [-1.0] * 4, **NORM), "keep")
    dropped = tie_selected(scaled(1.0, differ), "one")
    assert moe_of(dropped).expert_sharing == "0*4" and moe_of(dropped).moe_router_topk_scaling_factor is None


@pytest.mark.parametrize(("options", "layers", "sharing"), TABLE["students"])
def test_students_compute_with_the_layers_they_keep(
    options: dict[str, Any], layers: tuple[int, ...], sharing: str | None
) -> None:
    teacher = made(**options)
    routers = [len(weight) for name, weight in teacher.weights.items() if name.endswith(".router.weight")]
    teacher.weights["training.expert_fractions"] = torch.rand(len(routers), max(routers))
    student = keep_layers(teacher, layers)
    config = from_mapping(student.config, "test")
    assert config.moe.expert_sharing == sharing and config.model.num_layers == len(layers)
    assert config.moe.expert_layout == ("dense" if layers == (0, 2) and "moe_layer_freq" in options else "moe")
    assert differences(student) == []
    whole = in_memory(fold_shared(teacher)) if "expert_sharing" in options else teacher
    kept = keep_layers(whole, layers)
    assert_same(student, kept, 1e-6)
    assert torch.equal(
        student.read("layers.1.attention.qkv.weight"), teacher.weights[f"layers.{layers[1]}.attention.qkv.weight"]
    )


def test_candidates_that_change_are_refused_by_name() -> None:
    locked = made(expert_sharing="pool", num_experts=8, pool_lock_step=3, pool_lock_anneal_steps=2)
    for edited in (fold_shared, lambda s: tie_layers(s, "tied"), lambda s: keep_layers(s, (0, 1))):
        with pytest.raises(MegatronSamoeError, match="--pool-lock-step"):
            edited(locked)
