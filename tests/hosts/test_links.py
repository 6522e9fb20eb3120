"""A link that is most of a step: what its exchanges take, and which layout is fastest, against the planner.

The planner is calibrated by the same hosts over the same link.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.planning.gpus import measured_cluster, read_measured
from megatron_samoe.planning.layout_cost import step_cost
from tests.harness.program import arguments, write_corpus
from tests.hosts.cluster import SHARED, Cluster
from tests.hosts.job import OPTIONS, Job

pytestmark = [pytest.mark.distributed, pytest.mark.night]
STEPS, VOCABULARY = 12, 257
#: What one rank of each host sends, and two.
RATE, WIDER = "50mbit", "200mbit"
MODEL: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64}
MODEL |= {"expert_layout": "moe", "num_expert_banks": None, "num_experts": 4}
MODEL |= {"micro_batch_size": 2, "train_iters": STEPS, "lr_decay_iters": STEPS}
#: gloo makes a reduce-scatter of an all-reduce, which sends twice as much: by kind, how much more than planned goes out.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "dp": ({}, {}),
    "dp, zero": ({"use_distributed_optimizer": True}, {"gradients": 3 / 2}),
    "ep": ({"expert_model_parallel_size": 2}, {}),
    "tp": ({"tensor_model_parallel_size": 2}, {}),
    "pp": ({"pipeline_model_parallel_size": 2}, {}),
    "cp": ({"context_parallel_size": 2, "cp_comm_type": "a2a"}, {}),
}
#: Two ranks of each host: tensor parallelism stays inside, the others' exchanges go over the link. With both, steps of four ranks
#: on two cores differ by half from run to run.
ACROSS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "dp 4, zero": LAYOUTS["dp, zero"],
    "ep 4": ({"expert_model_parallel_size": 4}, {}),
    "tp 2, dp 2": ({"tensor_model_parallel_size": 2}, {}),
    "pp 2, dp 2": ({"pipeline_model_parallel_size": 2}, {}),
}


def measured(job_folder: Any) -> tuple[float, float]:
    """Returns the seconds of a step, and how many of them ranks waited: of the step that other work disturbed least."""
    records = [json.loads(line) for line in (job_folder / "metrics.jsonl").read_text().splitlines()][3:]
    steps = [(record["step_time_s"], record.get("own_time_mean_s", 0.0)) for record in records]
    return min(step_s for step_s, _ in steps), min(step_s - own_s for step_s, own_s in steps)


def run(cluster: Cluster, num_ranks: int, name: str, options: Mapping[str, Any]) -> tuple[float, float]:
    """Trains with ranks of each host, and returns `measured`."""
    Job(cluster, num_ranks, **{**MODEL, **options, "run_dir": SHARED / name}).succeed(300)
    return measured(cluster.shared / name)


def torchrun(cluster: Cluster, num_ranks: int, *words: object) -> str:
    """Runs a module on all hosts, and returns what they print."""
    agent = [
        "torchrun",
        "--nnodes=2",
        f"--nproc-per-node={num_ranks}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=host0:29500",
    ]
    runs = [host.start([*agent, "-m", *map(str, words)]) for host in cluster.hosts]
    return "".join(run.succeed(500) for run in runs)


def config_of(cluster: Cluster, options: Mapping[str, Any]) -> PretrainConfig:
    flags = arguments(data_path=cluster.shared / "data" / "corpus", **{**OPTIONS, **MODEL, **options})
    return parse_pretrain_args(flags)


def compare(cluster: Cluster, num_ranks: int, rate: str, layouts: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Calibrates the planner on two hosts, trains in each layout, and holds the order of planned times against steps.

    Returns:
        By layout, seconds of exchanges: planned, and waited; and of a step: planned, and measured.
    """
    write_corpus(cluster.shared / "data" / "corpus", num_documents=400)
    for host in (cluster.add(), cluster.add()):
        host.shape(rate)
    torchrun(cluster, num_ranks, "megatron_samoe.cli.plan", "--calibrate", SHARED / "machine.json")
    known = measured_cluster(read_measured(cluster.shared / "machine.json"), 2 * num_ranks)
    print(f"{rate}: {known}")
    found: dict[str, tuple[float, ...]] = {}
    for name, (options, more) in layouts.items():
        cost = step_cost(config_of(cluster, options), VOCABULARY, known)
        exchanges_s = sum(cost.seconds[kind] * more.get(kind, 1.0) for kind in cost.sent_bytes)
        local_s = sum(seconds for kind, seconds in cost.seconds.items() if kind not in cost.sent_bytes)
        step_s, waited_s = run(cluster, num_ranks, name.replace(", ", "-").replace(" ", ""), options)
        found[name] = exchanges_s, waited_s, local_s + exchanges_s, step_s
        print(
            "{}: exchanges {:.2f} s planned, {:.2f} s waited; step {:.2f} s planned, {:.2f} s".format(
                name, *found[name]
            )
        )
    for one, other in combinations(found.values(), 2):
        near = abs(one[2] - other[2]) < 0.2 * max(one[2], other[2])
        assert near or (one[2] < other[2]) == (one[3] < other[3]), found
    return found


def test_six_layouts(cluster: Cluster) -> None:
    found = compare(cluster, 1, RATE, LAYOUTS)
    for name in ("dp", "dp, zero", "ep", "cp"):  # the link that was measured lets bursts through
        assert found[name][1] == pytest.approx(found[name][0], rel=0.25), name
    assert 0.85 < found["tp"][1] / found["tp"][0] < 2.0, (
        "messages of 64 KB, for each of which ranks wait for each other"
    )


def test_four_layouts_of_four_ranks(cluster: Cluster) -> None:
    compare(cluster, 2, WIDER, ACROSS)
