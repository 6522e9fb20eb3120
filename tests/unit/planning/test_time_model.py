"""The model of time: worked by hand, also what Muon's matrices take, held against published runs of families that it was not fitted to,
and measured anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.config.derived import num_micro_batches
from megatron_samoe.errors import ConfigError
from megatron_samoe.optimizer.muon import newton_schulz_flops
from megatron_samoe.parallel_state import RankGrid, single_process_state
from megatron_samoe.planning.cluster import Cluster, Links
from megatron_samoe.planning.description import PlannedModel
from megatron_samoe.planning.gpus import FITTED, GPUS, gpu_cluster
from megatron_samoe.planning.layer_work import Product
from megatron_samoe.planning.layout_cost import step_cost
from megatron_samoe.planning.muon import flops_of_rank, matrices_of
from megatron_samoe.training.machine_speed import _line, measure
from tests.harness.program import call
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config, with_layout, with_options
from tools.planner.fit import errors, one_mfu, planned, sides

TABLE = table(__file__)

#: What held-out families gave when the constants were fitted, and a little more.
HELD_OUT_MEDIAN, HELD_OUT_NINE_OF_TEN = 0.14, 0.37
SLOW = Cluster(16, 8, 1e9, 1e12, 1e10, 1e9, memory_bandwidth=1e10, efficiency=0.5, product_traffic=2.0, latency_s=0.0)


def test_a_products_seconds_by_hand() -> None:
    """3 x [10, 20] x [20, 30] in 2 bytes: 36,000 operations a pass; weights 3 x 600, inputs and results 3 x 500 numbers."""
    product = Product(10, 20, 30, 2, 3)
    computed = 36_000 / 5e11
    assert product.seconds(SLOW, 1, 0) == pytest.approx(computed + 2 * 2 * (1800 + 1500) / 1e10)
    moved = 2 * (
        2 * (1800 + 3000) + 8 * 1800
    )  # backwards: inputs, results and weights, and fp32 gradients read and written
    assert product.seconds(SLOW, 0, 1) == pytest.approx(2 * computed + moved / 1e10)
    assert product.seconds(SLOW, 1, 0, peak=2e12) == pytest.approx(computed / 2 + 2 * 2 * (1800 + 1500) / 1e10)


def test_a_small_product_is_slower_for_its_size() -> None:
    large, small = Product(4096, 4096, 4096, 2), Product(64, 4096, 4096, 2)
    cluster = gpu_cluster("H100", 8)
    rate = [product.flops / product.seconds(cluster, 1, 0) for product in (large, small)]
    assert rate[0] > 0.6 * cluster.flops > 3 * rate[1]


def test_narrow_heads_and_unfused_experts_by_hand() -> None:
    """Heads of 8 take as long as heads of 16; 4 micro-batches of 32 tokens in 4 layers, each token with one expert."""
    config = tiny_config("moe")
    cluster = replace(SLOW, world_size=1)
    plain = step_cost(config, 103, cluster).seconds
    slow = step_cost(config, 103, replace(cluster, attention_width=16, expert_row_bytes=1000.0)).seconds
    assert slow["attention"] == pytest.approx(2 * plain["attention"])
    assert slow["memory"] - plain["memory"] == pytest.approx(4 * 32 * 4 * 1000 / 1e10)
    assert step_cost(config, 103, replace(cluster, attention_width=4)).seconds == plain


def test_a_host_counts_where_it_is_slower_than_its_gpu() -> None:
    config = tiny_config("dense")
    cluster = replace(SLOW, world_size=1, flops=1e15)
    seconds = step_cost(config, 103, replace(cluster, layer_launch_s=1.0)).seconds
    gpu = sum(seconds[part] for part in ("products", "attention", "memory"))
    assert seconds["host"] == pytest.approx(4 * 4 * 2 * 1.0, rel=1e-3) and gpu < 0.1
    assert step_cost(config, 103, replace(cluster, layer_launch_s=1e-9)).seconds["host"] == 0
    beside = step_cost(config, 103, replace(cluster, layer_launch_s=1e-9, launches_ahead=False)).seconds["host"]
    assert beside == pytest.approx(4 * 4 * 2 * 1e-9), "a processor launches and computes in turn"


def test_tokens_that_go_once_to_a_node() -> None:
    """16 ranks on 2 nodes, 8 choices: the other node is met with 1 - 2^-8, each other rank of this node with 1 - (15/16)^8."""
    links = Links(RankGrid(16, ep=16), replace(SLOW, sends_once=True))
    seconds, sent = links.dispatch("ep", 1e6, 8)
    near, far = 7e6 * (1 - (15 / 16) ** 8), 1e6 * (1 - 2**-8)
    assert sent == pytest.approx(near + far) and seconds == pytest.approx(max(near / 1e10, far / 1e9))
    plain = Links(RankGrid(16, ep=16), SLOW).dispatch("ep", 1e6, 8)
    assert plain == Links(RankGrid(16, ep=16), SLOW).all_to_all("ep", 8e6) and plain[0] > 3 * seconds


def test_the_error_on_families_held_out_is_the_known_one() -> None:
    to_fit, held_out = sides()
    ratios = [planned(row) / row.tokens_per_s for row in held_out]
    middle, most = errors(ratios)
    assert middle < HELD_OUT_MEDIAN and most < HELD_OUT_NINE_OF_TEN
    flat = errors([mfu / row.tokens_per_s for row, mfu in zip(held_out, one_mfu(held_out, to_fit), strict=True)])
    assert middle < 0.6 * flat[0] and most < flat[1], "one share of the peak for all is worse"
    inside = np.mean([1 / (1 + FITTED["spread"]) <= ratio <= 1 + FITTED["spread"] for ratio in ratios])
    assert 0.88 <= inside <= 0.95


def test_stages_that_wait_leave_their_processors_to_others() -> None:
    """Two stages: with a processor for each rank a stage is idle for one micro-batch; with one for two ranks nothing is."""
    config = tiny_config("dense", pipeline_model_parallel_size=2)
    own, shared = (replace(SLOW, world_size=2, ranks_per_processor=share) for share in (1.0, 2.0))
    first, second = (step_cost(config, 103, cluster) for cluster in (own, shared))
    batches = sum(first.seconds[part] for part in ("products", "attention", "memory", "host"))
    assert first.seconds["bubble"] == pytest.approx(batches / num_micro_batches(config, 2))
    assert second.seconds["bubble"] == 0


def test_gradients_in_16_bits_and_weights_that_are_gathered_ahead() -> None:
    """AdamW's exchange of N weights in fp32 by two ranks: gradients in 4 or 2 bytes, and weights in 4, half of each sent."""
    config = tiny_config("dense", use_distributed_optimizer=True)
    slow = replace(SLOW, world_size=2, gpus_per_node=1, inter_bandwidth=1e3)
    full = step_cost(config, 103, slow)
    half = step_cost(config, 103, replace(slow, gradient_bytes=2.0))
    assert half.sent_bytes["gradients"] == pytest.approx(full.sent_bytes["gradients"] * 6 / 8)
    overlapped = replace(config, parallel=replace(config.parallel, overlap_grad_reduce=True))
    after, ahead = (
        step_cost(overlapped, 103, replace(slow, gathers_ahead=gathers)).seconds["gradients"]
        for gathers in (False, True)
    )
    batches = sum(full.seconds[part] for part in ("products", "attention", "memory", "host")) / num_micro_batches(
        config, 2
    )
    assert full.seconds["gradients"] - after == pytest.approx(2 / 3 * batches)
    assert after - ahead == pytest.approx(batches / 3), "a forward pass is a third of a micro-batch"


def test_only_sharded_exchanges_take_longer_where_they_were_measured_so() -> None:
    slow = replace(SLOW, world_size=2, gpus_per_node=1, inter_bandwidth=1e3)
    for part, options, factor in TABLE["exchanges"]:
        ring, gloo = (
            step_cost(tiny_config("dense", **options), 103, replace(slow, sharded_exchange=times))
            for times in (1.0, 2.5)
        )
        assert gloo.seconds[part] == pytest.approx(factor * ring.seconds[part]) and ring.seconds[part] > 0
        assert gloo.sent_bytes == ring.sent_bytes


def test_an_unknown_gpu_is_refused_in_a_sentence() -> None:
    assert all(gpu_cluster(name, 8).flops == gpu.flops for name, gpu in GPUS.items())
    with pytest.raises(ConfigError, match=r"--gpu = 'V100': must be one of H100"):
        gpu_cluster("V100", 8)
    result = call("megatron_samoe.cli.plan", "--world-size", "8", "--gpu", "V100", "--vocab-size", "100")
    assert result.returncode == 2 and result.stderr.startswith("error: --gpu = 'V100'")


def test_choose_all_varies_micro_batches_and_offers_data_parallelism() -> None:
    model = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 16 --global-batch-size 16 --vocab-size 256"
    result = call("megatron_samoe.cli.plan", "--world-size", "8", "--choose-all", "--json", *model.split())
    layouts = json.loads(result.stdout)
    assert any(" dp8 " in layout["layout"] for layout in layouts), layouts
    assert len({layout["layout"].split()[-1].split("x")[0] for layout in layouts}) > 1
    for layout in layouts:
        low, high = layout["tokens_per_s_interval"]
        assert low < layout["tokens_per_s"] < high


def test_plan_says_what_dominates_and_what_one_change_buys() -> None:
    model = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 256 --expert-layout samoe --global-batch-size 16"
    out = call("megatron_samoe.cli.plan", "--world-size", "2", *model.split()).stdout
    assert "most of it" in out and "9 of 10 within" in out and "context GB" not in out
    assert "sharing experts: combining and contracting" in out
    assert "micro-batch 8 " in out.split("one change: ")[1] and "recompute full -" in out


def test_a_machine_is_measured_and_planned_for(tmp_path: Path) -> None:
    found = measure(single_process_state(), rounds=1, scale=1 / 16)
    assert min(found["flops"], found["memory_bandwidth"]) > 1e7 and "moe_launch_s" in found
    found["layer_launch_s"] = 0.001  # on a busy machine none is found
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(found))
    words = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 256 --json".split()
    result = call("megatron_samoe.cli.plan", "--world-size", "1", "--calibration", str(path), *words)
    layout = json.loads(result.stdout)[0]
    assert layout["seconds"]["host"] == pytest.approx(2 * 2 * found["layer_launch_s"] + found["step_s"])
    for damage, said in TABLE["calibrations"]:
        path.write_text(damage)
        result = call("megatron_samoe.cli.plan", "--world-size", "1", "--calibration", str(path), *words)
        assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr, result.stderr
    path.write_text(json.dumps(found))
    result = call("megatron_samoe.cli.plan", "--world-size", "2", "--calibration", str(path), *words)
    assert result.returncode == 2 and "'inter_bandwidth': is missing in the file" in result.stderr


def test_a_line_through_shapes() -> None:
    """Work that takes 2 s an operation and 3 s a byte: rows are operations and bytes of a second."""
    rows = [(f / (2 * f + 3 * b), b / (2 * f + 3 * b)) for f, b in ((1, 1), (5, 1), (1, 7), (100, 3))]
    assert _line(rows) == pytest.approx((2.0, 3.0))
    assert _line([(0.5, 0.01), (0.5, 0.1), (0.2, 0.0)])[1] == 0.0


CLUSTER = Cluster(4, 4, 1e11, 1e15, 4e11, 5e10)


def test_a_newton_schulz_step_is_three_products() -> None:
    # X X^T of [a, b], its square, and its product with X.
    assert newton_schulz_flops(3, 5, 2) == newton_schulz_flops(5, 3, 2) == 2 * 2 * (3 * 3 * 5 + 3**3 + 3 * 3 * 5)


def test_flops_of_a_dense_model() -> None:
    config = tiny_config("dense", optimizer="muon")
    planned = PlannedModel(config, VOCAB_SIZE, 1)
    # qkv is planned as one matrix [96, 32]; output [32, 32]; two of the MLP, 128 wide.
    layer = sum(newton_schulz_flops(*s, 5) for s in ((96, 32), (32, 32), (128, 32), (32, 128)))
    assert flops_of_rank(matrices_of(planned, 0), config.optimizer, planned.grid, 0) == pytest.approx(4 * layer)


@pytest.mark.parametrize("model", ["dense", "moe", "samoe"])
def test_ranks_share_the_work(model: str) -> None:
    config = tiny_config(model, optimizer="muon")
    alone = PlannedModel(config, VOCAB_SIZE, 1)
    whole = flops_of_rank(matrices_of(alone, 0), config.optimizer, alone.grid, 0)
    for layout in ({"zero": True}, {"tp": 2}, {"tp": 2, "sp": True, "zero": True}):
        spread = PlannedModel(with_layout(config, **layout), VOCAB_SIZE, 4)
        shares = [flops_of_rank(matrices_of(spread, rank), config.optimizer, spread.grid, rank) for rank in range(4)]
        assert sum(shares) == pytest.approx(whole), layout


def test_owners_beyond_the_number_of_matrices_do_nothing() -> None:
    config = tiny_config("dense", optimizer="muon")
    few = [PlannedModel(with_layout(config, zero=True), VOCAB_SIZE, ranks) for ranks in (4, 8)]
    # Each of the four layers has one matrix of a kind.
    one_each, too_many = (flops_of_rank(matrices_of(p, 0), config.optimizer, p.grid, 0) for p in few)
    assert too_many == one_each


def test_a_step_takes_longer_and_bf16_products_less() -> None:
    config = with_layout(tiny_config("samoe"), tp=2, zero=True)
    costs = [
        step_cost(with_options(config, **o), VOCAB_SIZE, CLUSTER).seconds.get("muon", 0.0)
        for o in ({}, {"optimizer": "muon"}, {"optimizer": "muon", "muon_ns_dtype": "bf16"})
    ]
    assert costs[0] == 0.0 < costs[2] < costs[1]
    measured_in_fp32 = replace(CLUSTER, fp32_share=1.0)
    fp32 = step_cost(with_options(config, optimizer="muon"), VOCAB_SIZE, measured_in_fp32).seconds["muon"]
    assert fp32 == pytest.approx(costs[2])


def test_directions_travel_in_fp32() -> None:
    """Of two ranks each makes half of them and gets the other half; with slices a quarter of all goes to its owner, and a quarter back."""
    config = tiny_config("dense", optimizer="muon")
    whole_bytes = 4 * sum(m.numel for m in matrices_of(PlannedModel(config, VOCAB_SIZE, 1), 0))
    for zero in (False, True):
        cost = step_cost(with_layout(config, zero=zero), VOCAB_SIZE, Cluster(2, 2, 1e11, 1e15, 4e11, 5e10))
        assert cost.sent_bytes["muon"] == pytest.approx(whole_bytes / 2)
