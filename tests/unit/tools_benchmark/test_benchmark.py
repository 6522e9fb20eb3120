"""`megatron-samoe benchmark`: contestants do the same work, figures follow from each other, peers are asked as described."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import extension
from tests.harness import program
from tools.benchmarks import contestants, dispatch, harness, roofline
from tools.benchmarks.decode import Decode
from tools.benchmarks.layer import LayerShape, MoELayerBenchmark
from tools.benchmarks.memory import reader

needs_extension = pytest.mark.skipif(not extension.load(), reason="compares the compiled extension")

PEER = """
import json, sys
print("a line of a library")
print("@@{}", flush=True)
for line in sys.stdin:
    words = line.split()
    if words[0] == "build" and words[1] == "bf16":
        answer = {"err": "no bf16 here"}
    elif words[0] == "build":
        experts = int(words[2])
        answer = {}
    else:
        answer = {"s": 1000.0 * experts}
    print("@@" + json.dumps(answer), flush=True)
"""


#: Sizes of a model of which steps are measured.
SMALL = "--num-layers 2 --seq-length 16 --hidden-size 64 --num-experts 4 --vocab-size 64 --threads 1"


def saved(folder: Path, command: str) -> dict[str, Any]:
    """Returns what one round of a benchmark leaves in its file."""
    words = [*command.split(), "--rounds", "1", "--json", str(folder / "saved/a.json")]
    program.start(words, folder, program="megatron_samoe.gpu_check.command").succeed(300)
    content: dict[str, Any] = json.loads((folder / "saved/a.json").read_text())
    return content


def test_medians_leave_the_first_round_out() -> None:
    seconds = iter([100.0, 3.0, 1.0, 2.0])
    times = harness.in_turn({"other process": lambda: next(seconds)}, rounds=3)
    assert harness.medians_of(times) == {"other process": 2.0}


@needs_extension
@pytest.mark.parametrize("way", ["index_add", "gather", "embedding_bag"])
def test_plain_routing_is_the_compiled_routing(way: str) -> None:
    torch.manual_seed(1)
    dy_TH, results = torch.randn(60, 16), []
    logits_TE, x_TH = torch.randn(60, 8, requires_grad=True), torch.randn(60, 16, requires_grad=True)
    for route in (
        lambda: dispatch.route_compiled(logits_TE, x_TH, 2),
        lambda: dispatch.route_plain(logits_TE, x_TH, 2, way),
    ):
        y_TH, aux = route()
        results.append((y_TH, aux, *torch.autograd.grad((y_TH, aux), (logits_TE, x_TH), (dy_TH, torch.ones(())))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@needs_extension
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_roofline_counts_the_layers_work(activation: str) -> None:
    sizes = {"tokens": 96, "hidden_size": 32, "ffn_hidden_size": 64, "activation": activation}
    rows = roofline.Roofline(**sizes, topk=2, num_experts=(4,), rounds=1, threads=1).rows()
    flops = {row["part"]: row["GFLOP"] for row in rows}
    shape = LayerShape(**sizes, topk=2, num_experts=4)
    made, bare = roofline.parts(shape), roofline.bare_products(shape)
    products = 3 * 2 * 192 * 32 * 64 * (3 if activation == "swiglu" else 2)
    assert made["experts"].flops + made["experts backward"].flops == products
    assert sum(part.flops for part in bare.values()) == products
    assert set(flops) == {"limit: product", "limit: copy", *made, *bare}
    limits = {row["part"]: row for row in rows if row["part"].startswith("limit")}
    assert all(row["share_of_roof"] == 1.0 for row in limits.values())
    for row in rows:
        limit = "product" if row["bound"] == "products" else "copy"
        speed = "GFLOP:s" if row["bound"] == "products" else "GB:s"
        if row[speed] > 10:  # printed to 0.1
            assert row["share_of_roof"] == pytest.approx(row[speed] / limits[f"limit: {limit}"][speed], rel=0.02)


def test_peers_are_asked_by_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w1_moe_layer.py").write_text(PEER)
    sizes = {"tokens": 256, "hidden_size": 64, "ffn_hidden_size": 128}
    made = MoELayerBenchmark(
        **sizes, dtype=("fp32", "bf16"), num_experts=(4, 8), rounds=1, threads=1, peers=tmp_path, peer_names=("slow",)
    )
    rows = made.rows()
    flops = 3 * 2 * 256 * 64 * 256
    assert [(row["dtype"], row["experts"]) for row in rows] == [("fp32", 4), ("fp32", 8), ("bf16", 4), ("bf16", 8)]
    for row in rows:
        if row["dtype"] == "fp32":
            seconds = flops / (row["layer GFLOP:s"] * 1e9)
            assert row["layer / best peer"] == pytest.approx(1000.0 * row["experts"] / seconds, rel=0.3)
        else:
            assert "layer / best peer" not in row
    assert capsys.readouterr().out.count("slow: no bf16 here") == 2


def test_a_peer_that_ends_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w2_train_step.py").write_text("raise SystemExit(3)")
    with MoELayerBenchmark(peers=tmp_path).running("w2_train_step.py", ["broken"], {}) as peers:
        assert peers == []
    assert "broken did not start: ended with status 3" in capsys.readouterr().out


@needs_extension
def test_a_run_leaves_its_conditions(tmp_path: Path) -> None:
    found = saved(tmp_path, "dispatch --tokens 64 --hidden-size 16 --num-experts 4 --threads 1")
    assert found["conditions"]["arguments"]["tokens"] == 64 and found["conditions"]["threads"] == 1
    assert [(row["op"], row["dtype"]) for row in found["rows"]] == [
        (op, dtype) for dtype in ("fp32", "bf16") for op in ("dispatch", "dispatch, torch as it comes")
    ]
    for row in found["rows"]:
        ratio = row["index_add ms"] / row["compiled ms"]
        assert row["compiled / index_add"] == pytest.approx(ratio, abs=0.02)


@pytest.mark.night
def test_whole_models_are_compared_at_equal_active_parameters(tmp_path: Path) -> None:
    found = saved(tmp_path, f"train-step {SMALL} --micro-batch-size 2 --ffn-hidden-size 64")
    rows = {row["model"]: row for row in found["rows"]}
    assert list(rows) == ["dense", "moe", "samoe"] and rows["dense"]["speed / dense"] == 1.0
    router = 2 * 4 * 64
    assert rows["moe"]["active"] == rows["dense"]["active"] + router
    for row in rows.values():
        assert row["speed / dense"] == pytest.approx(row["tokens:s"] / rows["dense"]["tokens:s"], rel=0.01)
        assert 100 < row["peak_mb"] < 2000


@pytest.mark.night
def test_optimizers_are_compared_by_whole_steps_and_alone(tmp_path: Path) -> None:
    steps = saved(tmp_path, f"train-step --layouts moe --optimizers adam muon {SMALL} --micro-batch-size 1")["rows"]
    whole = {row["model"]: row for row in steps}
    assert list(whole) == ["moe", "moe, muon"] and whole["moe"]["speed / moe"] == 1.0
    rows = {row["optimizer"]: row for row in saved(tmp_path, f"muon {SMALL} --micro-batch-size 1")["rows"]}
    assert list(rows) == ["adam", "muon", "muon, bf16 products", "torch Muon"]
    # Five steps; by layer four squares of attention, four experts of two matrices of 256 x 64.
    assert rows["muon"]["GFLOP"] == round(2 * 2 * 5 * 64**2 * (4 * 192 + 8 * (2 * 256 + 64)) / 1e9, 2)


@pytest.mark.night
@needs_extension
@pytest.mark.distributed
def test_ranks_are_compared_with_what_sends_nothing(tmp_path: Path) -> None:
    sizes = "--tokens 64 --hidden-size 16 --ffn-hidden-size 32 --num-experts 4"
    (row,) = saved(tmp_path, f"expert-parallel {sizes}")["rows"]
    ratio = row["alone ms"] / row["expert parallel ms"]
    assert row["ranks"] == 2 and row["expert parallel / alone"] == pytest.approx(ratio, rel=0.05)


@pytest.mark.night
@needs_extension
@pytest.mark.distributed
def test_exchanges_are_compared_in_one_run(tmp_path: Path) -> None:
    (row,) = saved(tmp_path, "all-to-all --ranks 2 --megabytes 0.0625 --uneven")["rows"]
    assert row["rings / gloo"] == pytest.approx(row["gloo"] / row["rings"], rel=0.05)
    assert row["rings / copy"] == pytest.approx(row["copy"] / row["rings"], abs=0.02)


def test_other_processes_have_no_processor_time_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--clock"):
        MoELayerBenchmark(peers=tmp_path, clock="cpu").rows()


TINY = {"hidden_size": 64, "ffn_hidden_size": 64, "num_layers": 2, "num_experts": 4, "vocab_size": 64, "context": 32}


def test_more_tokens_than_a_model_has_positions_are_refused(tmp_path: Path) -> None:
    made = Decode(**TINY, work_dir=tmp_path, prompt_lengths=(4, 20), new_tokens=12)  # type: ignore[arg-type]
    assert made.checkpoints(), "the longest prompt and its answer just fit"
    with pytest.raises(ConfigError, match="--new-tokens = 13: at most 12"):
        replace(made, new_tokens=13).checkpoints()


def test_another_contestant_begins_each_round() -> None:
    class Asked:
        def measure(self, *_: int) -> dict[str, int]:
            return {}

    workers = [Asked(), Asked(), Asked()]
    order = [workers.index(worker) for _, worker, _ in Decode(rounds=4, batch_sizes=(1,)).measure(workers)]  # type: ignore[arg-type]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]


def test_a_dense_model_is_dense_although_that_is_the_default(tmp_path: Path) -> None:
    for flags, experts in (("", True), ("--expert-layout dense", False), ("--expert-layout=dense", False)):
        made = Decode(**TINY, work_dir=tmp_path).make_checkpoint(flags)  # type: ignore[arg-type]
        names = contestants.opened(made).tensors
        assert any("moe" in name for name in names) == experts, flags


def test_llama_cpp_is_given_a_file_of_the_precision(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    made = Decode(**TINY, work_dir=tmp_path, peers=("llama.cpp",), llama_python="python")  # type: ignore[arg-type]
    checkpoints = [made.make_checkpoint("")]
    sizes = []
    for dtype in ("fp32", "bf16"):
        (theirs,) = (one for one in made.contestants(dtype, checkpoints) if one.name == "llama.cpp")  # type: ignore[arg-type]
        sizes.append(Path(theirs.spec["file"]).stat().st_size)
    assert 1.5 < sizes[0] / sizes[1] < 2


def test_every_word_is_read_once_per_way() -> None:
    read = reader()
    words = np.zeros(8 * (4 * 3 * 5 + 1), np.uint64)
    start = -words.ctypes.data // 8 % 8  # the program reads lines
    lines = words[start : start + 8 * 4 * 3 * 5]
    for asks in (0, 1):
        for num_threads in (1, 3):
            for place in range(len(lines)):
                lines[place] = 1 << place % 64
                assert read(lines.ctypes.data, lines.nbytes, num_threads, asks) == 1 << place % 64
                lines[place] = 0
