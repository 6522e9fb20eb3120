"""A link that is most of a step: what its exchanges take, and which layout is fastest, against the planner.

Two hosts of one rank each, since ranks that outnumber cores wait for each other's turns.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.planning.layout_cost import Cluster as Planned
from megatron_samoe.planning.layout_cost import step_cost
from tests.harness.program import arguments, start, write_corpus
from tests.hosts.cluster import SHARED, Cluster
from tests.hosts.job import OPTIONS, Job
from tests.hosts.overlap import MODELS

pytestmark = [pytest.mark.distributed, pytest.mark.night]
STEPS, VOCABULARY = 12, 257
#: 6.25 MB/s.
RATE, BANDWIDTH = "50mbit", 6.25e6
TWO = Planned(2, 1, 1e12, 1e9, 1e12, BANDWIDTH, memory_bandwidth=1e10, efficiency=1.0, latency_s=3e-4)
MODEL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64, "micro_batch_size": 2,
    "expert_layout": "moe", "num_expert_banks": None, "num_experts": 4, "train_iters": STEPS, "lr_decay_iters": STEPS,
}  # fmt: skip
#: gloo makes a reduce-scatter of an all-reduce, which sends twice as much: by kind, how much more than planned goes out.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "dp": ({}, {}),
    "dp, zero": ({"use_distributed_optimizer": True}, {"gradients": 3 / 2}),
    "ep": ({"expert_model_parallel_size": 2}, {}),
    "tp": ({"tensor_model_parallel_size": 2}, {}),
    "pp": ({"pipeline_model_parallel_size": 2}, {}),
    "cp": ({"context_parallel_size": 2, "cp_comm_type": "a2a"}, {}),
}


def measured(job_folder: Any) -> tuple[float, float]:
    """Returns the seconds of a step, and how many of them ranks waited: of the step that other work disturbed least."""
    records = [json.loads(line) for line in (job_folder / "metrics.jsonl").read_text().splitlines()][3:]
    steps = [(record["step_time_s"], record.get("own_time_mean_s", 0.0)) for record in records]
    return min(step_s for step_s, _ in steps), min(step_s - own_s for step_s, own_s in steps)


def run(cluster: Cluster, name: str, options: Mapping[str, Any]) -> tuple[float, float]:
    """Trains, and returns `measured`."""
    for host in cluster.hosts:
        host.shape(RATE)
    Job(cluster, **{**MODEL, **options, "run_dir": SHARED / name}).succeed(300)
    return measured(cluster.shared / name)


def config_of(cluster: Cluster, options: Mapping[str, Any]) -> PretrainConfig:
    flags = arguments(data_path=cluster.shared / "data" / "corpus", **{**OPTIONS, **MODEL, **options})
    return parse_pretrain_args(flags)


@pytest.fixture
def planned(cluster: Cluster) -> Planned:
    """The cluster as the planner knows it: products as fast as in one process that has it alone."""
    write_corpus(cluster.shared / "data" / "corpus", num_documents=400)
    flags = arguments(
        data_path=cluster.shared / "data" / "corpus", run_dir=cluster.folder / "one", **{**OPTIONS, **MODEL}
    )
    start(flags, cluster.folder / "one-out").succeed(200)
    alone = step_cost(config_of(cluster, {}), VOCABULARY, replace(TWO, world_size=1)).seconds
    seconds = alone["products"] + alone["attention"]
    flops = 1e9 * seconds / measured(cluster.folder / "one")[0]
    for _ in range(2):
        cluster.add()
    print(f"{flops / 1e9:.1f} GFLOP/s, {RATE}")
    return replace(TWO, flops=flops)


def test_six_layouts(cluster: Cluster, planned: Planned) -> None:
    found = {}
    for name, (options, more) in LAYOUTS.items():
        cost = step_cost(config_of(cluster, options), VOCABULARY, planned)
        exchanges = {
            kind: seconds * more.get(kind, 1.0) for kind, seconds in cost.seconds.items() if kind in cost.sent_bytes
        }
        step_s, waited_s = run(cluster, name, options)
        local_s = sum(seconds for kind, seconds in cost.seconds.items() if kind not in cost.sent_bytes)
        found[name] = sum(exchanges.values()), waited_s, local_s + sum(exchanges.values()), step_s
        print(
            "{}: exchanges {:.2f} s planned, {:.2f} s waited; step {:.2f} s planned, {:.2f} s".format(
                name, *found[name]
            )
        )
    for one, other in combinations(found.values(), 2):
        near = abs(one[2] - other[2]) < 0.2 * max(one[2], other[2])
        assert near or (one[2] < other[2]) == (one[3] < other[3]), found
    for name in ("dp", "dp, zero", "ep", "tp", "cp"):
        assert found[name][1] == pytest.approx(found[name][0], rel=0.15), name


def test_what_runs_beside_products(cluster: Cluster) -> None:
    """What docs/cluster.md says of it: SAMOE_HOSTS_ROUNDS=30 on an idle machine."""
    for host in (cluster.add(), cluster.add(delay_s=0.001)):
        host.shape("1gbit", "128kb")
    words = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=host0:29500"]
    words += ["-m", "tests.hosts.overlap", os.environ.get("SAMOE_HOSTS_ROUNDS", "5")]
    runs = [host.start(words) for host in cluster.hosts]
    output = "".join(run.succeed(500) for run in runs)
    medians = json.loads(re.findall("medians (.*)", output)[0])
    for name in MODELS:
        alone, after, beside = (medians[f"{name}, {how}"] for how in ("alone", "after", "beside"))
        hidden = (after - beside) / (after - alone)
        print(f"{name}: alone {alone:.3f} s, exchanges after {after:.3f} s, beside {beside:.3f} s: {hidden:.0%} hidden")
        assert alone < after, f"{name}: exchanges took no time: {medians}"
