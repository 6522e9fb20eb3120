"""Layouts of a cluster: legal, complete, within memory, ranked; groups and volumes against what is listed or counted."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.config import MoEConfig, ParallelConfig, PretrainConfig
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.derived import parse_stage_layout, uneven_layout
from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state import RankGrid
from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.pipeline_parallel.schedule_plan import bubble_fraction
from megatron_samoe.planning.accounting import count_parameters
from megatron_samoe.planning.layout_cost import Cluster, Links, step_cost
from megatron_samoe.planning.layout_planner import plan_layouts
from megatron_samoe.planning.layout_plot import draw_layout
from megatron_samoe.planning.memory import largest_rank_memory
from tests.harness.program import call
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout, with_options

TABLE = table(__file__)

CLUSTER = Cluster(8, 4, 1e9, 1e12, 1e11, 1e10)


def plain(layout: str, **options: Any) -> PretrainConfig:
    """Returns a tiny configuration without options that its layout would ignore."""
    config = tiny_config(layout, **options)
    return replace(config, moe=MoEConfig()) if layout == "dense" else config


def with_world(world_size: int, **changes: Any) -> Cluster:
    return replace(CLUSTER, world_size=world_size, **changes)


@pytest.mark.parametrize("model", ["dense", "moe", "samoe"])
@pytest.mark.parametrize("world_size", [1, 2, 6, 8])
def test_layouts_are_legal_fit_and_come_fastest_first(model: str, world_size: int) -> None:
    config = with_options(plain(model), global_batch_size=48)
    layouts = plan_layouts(config, 103, with_world(world_size))
    for layout in layouts:
        validate(replace(layout.config, data=DataConfig(mock_data=True)), world_size)
        assert (layout.rank, layout.memory) == largest_rank_memory(layout.config, 103, world_size)
        assert layout.memory.total <= CLUSTER.memory_bytes
        assert layout.cost.step_s == pytest.approx(sum(layout.cost.seconds.values())) and layout.cost.step_s > 0
    speeds = [layout.tokens_per_s for layout in layouts]
    assert speeds == sorted(speeds, reverse=True)
    assert len({(layout.name(), layout.options()) for layout in layouts}) == len(layouts)


@pytest.mark.parametrize("options", [{"sliding_window": 1024}, {"reset_attention_mask": True}])
def test_what_one_exchange_of_context_does_not_serve_is_planned_with_the_other(options: dict[str, Any]) -> None:
    config = with_options(plain("dense", **options), seq_length=16384, global_batch_size=4, num_layers=1)
    config = replace(config, model=replace(config.model, position_embedding_type="rope"))
    layouts = plan_layouts(config, 103, with_world(4, memory_bytes=1e12))
    for layout in layouts:
        validate(replace(layout.config, data=replace(config.data, mock_data=True)), 4)
    ways = {layout.config.parallel.cp_comm_type for layout in layouts if "cp" in layout.name()}
    assert ways == {"a2a"}, "windows and documents do not go round the ring"
    other = plan_layouts(
        with_options(config, sliding_window=None, reset_attention_mask=False), 103, with_world(4, memory_bytes=1e12)
    )
    assert {layout.config.parallel.cp_comm_type for layout in other if "cp" in layout.name()} == {"a2a", "p2p"}


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_recomputed_attention_exchanges_its_context_again(comm: str) -> None:
    config = with_layout(with_options(plain("dense"), seq_length=64), cp=2, comm=comm)
    kinds = (None, "selective", "full")
    none, selective, full = (
        step_cost(with_options(config, recompute_granularity=kind), 103, with_world(2)).sent_bytes["context"]
        for kind in kinds
    )
    if comm == "a2a":  # what the core returned need not go back again, as nothing of that is kept
        assert none < selective < full
    else:
        assert none < selective == full


def test_every_legal_choice_of_sizes_is_among_them() -> None:
    config = with_options(tiny_config("moe"), global_batch_size=16)
    sizes = set()
    for layout in plan_layouts(config, 103, with_world(8, gpus_per_node=8)):
        p = layout.config.parallel
        sizes.add(
            (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.expert_model_parallel_size, p.expert_tp)
        )
    expected = set()
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4):
            for ep in (1, 2, 4, 8):
                for etp in {1, tp}:
                    parallel = ParallelConfig(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
                    try:
                        validate(replace(config, parallel=parallel, data=DataConfig(mock_data=True)), 8)
                    except ConfigError:
                        continue
                    expected.add((tp, pp, ep, etp))
    assert sizes == expected and len(expected) > 15


def test_what_the_user_has_fixed_is_kept() -> None:
    config = with_layout(tiny_config("samoe"), tp=2, ep=2, zero=True)
    config = with_options(config, samoe_pool_placement="replicated", recompute_granularity="full")
    for layout in plan_layouts(config, 103, with_world(8)):
        parallel = layout.config.parallel
        assert (parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size) == (2, 2)
        assert layout.config.moe.samoe_pool_placement == "replicated"
        assert layout.config.training.recompute_granularity == "full"


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_sequences_are_split_as_the_user_says(comm: str) -> None:
    config = with_options(tiny_config("moe"), global_batch_size=16, seq_length=64)
    split = with_layout(config, cp=2, comm=comm)
    for layout in plan_layouts(split, 103, with_world(8)):
        assert parse_pretrain_args(layout.flags()).parallel == layout.config.parallel
        assert layout.config.parallel.context_parallel_size == 2 and " cp2 " in layout.name()
        assert layout.cost.sent_bytes["context"] > 0
    alone, halved = (largest_rank_memory(c, 103, 2)[1] for c in (config, split))
    assert halved.weights == alone.weights and halved.optimizer == alone.optimizer
    assert halved.activations < 0.75 * alone.activations


@pytest.mark.parametrize("layout", ["dense", "samoe"])
def test_long_sequences_are_split_where_that_is_faster_or_fits(layout: str) -> None:
    """32,768 tokens: one rank cannot hold a sequence's activations; the ranks of one node can."""
    config = with_options(
        plain(layout), seq_length=32768, max_position_embeddings=32768, hidden_size=256, num_attention_heads=8, num_layers=4,
        global_batch_size=8, bf16=True,
    )  # fmt: skip
    cluster = with_world(8, gpus_per_node=8, memory_bytes=0.45e9)
    fixed = replace(
        config, parallel=replace(config.parallel, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    )
    layouts = plan_layouts(fixed, 103, cluster)
    sizes = {found.config.parallel.context_parallel_size for found in layouts}
    assert sizes - {1} and sizes <= {1, 2, 4, 8}
    alone = [found for found in layouts if found.config.parallel.tensor_model_parallel_size == 1]
    assert alone and all(found.config.parallel.context_parallel_size > 1 for found in alone)
    for found in layouts[:5]:
        validate(replace(found.config, data=DataConfig(mock_data=True)), 8)
    short = plan_layouts(with_options(config, seq_length=4096), 103, replace(cluster, memory_bytes=1e12))
    assert {found.config.parallel.context_parallel_size for found in short} == {1}


def test_the_printed_flags_ask_for_the_layout() -> None:
    config = with_options(tiny_config("samoe"), num_layers=6)
    base = PretrainConfig(model=config.model, moe=config.moe, training=replace(config.training, global_batch_size=None))
    tight = with_world(8, memory_bytes=plan_layouts(base, 103, with_world(8))[0].memory.total * 0.7)
    layouts = plan_layouts(base, 103, tight, micro_batch_sizes=(1, 2))
    assert len(layouts) > 100
    for layout in layouts[::10]:  # to read a command line takes a tenth of a second
        asked = parse_pretrain_args(["--expert-layout", "samoe", *layout.flags()])
        assert asked.parallel == layout.config.parallel
        assert asked.moe.samoe_combine == layout.config.moe.samoe_combine
        assert asked.moe.samoe_pool_placement == layout.config.moe.samoe_pool_placement
        assert asked.training.recompute_granularity == layout.config.training.recompute_granularity
        assert asked.training.micro_batch_size == layout.config.training.micro_batch_size


def test_less_memory_leads_to_recomputation_and_then_to_a_refusal_that_says_by_how_much() -> None:
    config = with_options(plain("dense"), seq_length=64, micro_batch_size=8, global_batch_size=8)
    roomy = plan_layouts(config, 103, with_world(1))[0]
    assert roomy.config.training.recompute_granularity is None
    tight = plan_layouts(config, 103, with_world(1, memory_bytes=roomy.memory.total * 0.8))[0]
    assert tight.config.training.recompute_granularity == "full" and tight.cost.step_s > roomy.cost.step_s
    with pytest.raises(ConfigError, match=r"--memory-gb = 1e-06.*smallest, tp1 pp1 dp1.*misses .* MB"):
        plan_layouts(config, 103, with_world(1, memory_bytes=1000))


def test_a_world_that_no_layout_fills_is_refused() -> None:
    with pytest.raises(ConfigError, match="--global-batch-size = 8"):
        plan_layouts(plain("dense", num_attention_heads=1), 103, with_world(512))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.data())
def test_uneven_layouts_hold_every_layer_and_spare_the_ends(num_layers: int, data: st.DataObject) -> None:
    pp = data.draw(st.integers(2, 32))
    counts = parse_stage_layout(uneven_layout(num_layers, pp))
    assert len(counts) == pp and sum(counts) == num_layers
    assert max(counts) - min(counts) <= 1 and counts[-1] == min(counts)


@pytest.mark.night
def test_sixteen_thousand_ranks_take_seconds() -> None:
    config = with_options(
        tiny_config("samoe", bf16=True), num_layers=48, hidden_size=8192, num_attention_heads=64, seq_length=2048,
        num_experts=64, num_expert_banks=12, moe_layer_freq="2", micro_batch_size=1, global_batch_size=16384,
    )  # fmt: skip
    started = time.process_time()
    layouts = plan_layouts(config, 51200, Cluster(16384, 8, 72e9, 1e15, 4.5e11, 5e10))
    assert len(layouts) > 100
    assert time.process_time() - started < 15  # four times as long, if every layout built its modules


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.sampled_from([1, 2, 4, 8]))
def test_node_mates_and_strides_equal_the_listed_groups(tp: int, pp: int, ep: int, more: int, node: int) -> None:
    grid = RankGrid(2 ** (tp + pp + ep + more), tp=2**tp, pp=2**pp, ep=2**ep, etp=1 if more < tp else 2**tp)
    links = Links(grid, with_world(grid.world_size, gpus_per_node=node))
    for name in set(GROUPS) - {"embed_dp"}:
        ranks = grid.groups(name)[0]
        assert links.size(name) == len(ranks)
        assert links.members_in_node(name) == sum(rank < node for rank in ranks), (name, ranks)


def test_volumes_by_hand() -> None:
    dense = plain("dense")
    parameters = count_parameters(dense, 103).total
    tokens, hidden = 2 * 16, 32
    two = step_cost(with_layout(dense), 103, with_world(2))
    assert two.sent_bytes == {"gradients": pytest.approx(parameters * 4)}, "an all-reduce over two: n bytes, fp32"
    zero = step_cost(with_layout(dense, zero=True), 103, with_world(2))
    assert zero.sent_bytes == {"gradients": pytest.approx(parameters * 4)}, "half out, half back"
    tensor = step_cost(with_layout(dense, tp=2), 103, with_world(2))
    # 4 micro-batches; 4 layers, 2 regions, forwards and backwards; embeddings, and the head backwards: an all-reduce each (2 x half).
    assert tensor.sent_bytes["tensor"] == pytest.approx(4 * (4 * 2 * 2 + 2) * tokens * hidden * 4)
    pipe = step_cost(with_layout(dense, pp=2), 103, with_world(2))
    assert pipe.sent_bytes["pipeline"] == pytest.approx(4 * tokens * hidden * 4), (
        "activations one way, gradients the other"
    )
    four = step_cost(with_layout(dense, pp=4), 103, with_world(4))
    assert four.sent_bytes["pipeline"] == pytest.approx(4 * 2 * tokens * hidden * 4)
    moe = step_cost(with_layout(tiny_config("moe", moe_router_topk=2), ep=2), 103, with_world(2))
    # 2 micro-batches on each of two data-parallel ranks; half of both rows go away and come back, in both passes.
    assert moe.sent_bytes["expert"] == pytest.approx(2 * 4 * 4 * 2 * tokens * hidden * 4 / 2)


def test_the_pools_traffic_is_that_of_its_formula() -> None:
    """Gather twice and reduce-scatter once, in fp32: 12 bytes an element over D holders times (D - 1) / D; or, with more
    banks than a stage has layers, weights and gradients of those layers."""
    config = tiny_config("samoe", disable_bias_linear=True)
    banks = count_parameters(config, 103).expert
    slices = step_cost(with_layout(config, pp=4), 103, with_world(8))
    assert slices.sent_bytes["pool"] == pytest.approx(banks / 2 * 1 * 8 * 7 / 8)
    shared = step_cost(with_layout(config, pp=2), 103, with_world(4))
    assert shared.sent_bytes["pool"] == pytest.approx(banks * 12 * 3 / 4)
    layer = step_cost(with_layout(with_options(config, samoe_combine="layer"), pp=2), 103, with_world(4))
    assert layer.sent_bytes["pool"] == pytest.approx(banks * 8 * 3 / 4)


@pytest.mark.parametrize(("micro_batches", "vpp"), [(4, None), (8, None), (8, 1)])
def test_the_bubbles_share_is_the_theoretical_one(micro_batches: int, vpp: int | None) -> None:
    config = with_options(plain("dense", num_layers=4), micro_batch_size=1, global_batch_size=micro_batches)
    config = with_layout(config, pp=2) if vpp is None else with_layout(config, pp=2, vpp=vpp)
    seconds = step_cost(config, 103, with_world(2, latency_s=0.0)).seconds
    share = seconds["bubble"] / (seconds["bubble"] + seconds["products"] + seconds["attention"])
    assert share == pytest.approx(bubble_fraction(2, 1 if vpp is None else 2, micro_batches))


def test_the_picture_has_every_ranks_places_on_both_grids(tmp_path: Path) -> None:
    config = with_layout(tiny_config("moe", num_layers=4), tp=2, pp=2, ep=2)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_layout(tmp_path / "layout.svg", config, 16, "layout", 8)
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "layout.svg").read_text())
    grid = RankGrid.of(config.parallel, 16)
    for rank in range(16):
        dense, expert = (grid.coordinates(rank, which) for which in ("dense", "expert"))
        expected = [f"t{dense['tp']} d{dense['dp']}", f"t{expert['etp']} e{expert['ep']} D{expert['edp']}"]
        assert shown[(at := shown.index(str(rank))) + 1 : at + 3] == expected
    draw_layout(tmp_path / "layout.png", tiny_config("moe", num_layers=4), 1, "layout", 8)
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--plot"):
        draw_layout(tmp_path / "none" / "layout.png", config, 16, "layout", 8)


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    model = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"]
    return call("megatron_samoe.cli.plan", *model, *words)


def test_the_tool_prints_what_it_found_as_json() -> None:
    result = run_tool("--world-size", "8", "--expert-layout", "samoe", "--json", "--top", "3", "--vocab-size", "1000")
    layouts = json.loads(result.stdout)
    assert result.returncode == 0 and len(layouts) == 3
    for layout in layouts:
        assert layout["peak_bytes"] >= layout["bytes"]["weights"] > 0 and layout["step_s"] > 0


@pytest.mark.parametrize(("words", "named"), TABLE["refused"])
def test_the_tool_explains_what_is_wrong(words: tuple[str, ...], named: str) -> None:
    result = run_tool(*words)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and named in result.stderr
