"""The commands of examples/pretrain_slurm.sh on several hosts: the losses of one process, what goes over the cables, and what a link
that is most of a step takes, against the planner that the same hosts calibrate over it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.planning.gpus import measured_cluster, read_measured
from megatron_samoe.planning.layout_cost import Cluster as Planned
from megatron_samoe.planning.layout_cost import step_cost
from tests.harness.pairs import first_by_day
from tests.harness.program import arguments, write_corpus
from tests.hosts.cluster import SHARED, Cluster
from tests.hosts.job import OPTIONS, STEPS, Job

pytestmark = pytest.mark.distributed

night = pytest.mark.night
#: Tensor parallelism lies inside a host; what else is there crosses.
EXPERTS = {"expert_model_parallel_size": 4}
STAGES = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
ALL = {**STAGES, "expert_model_parallel_size": 2, "use_distributed_optimizer": True}
LAYOUTS = {
    "2 hosts, experts across": (2, EXPERTS, "shared memory and torch"),
    "2 hosts, stages across": (2, STAGES, "gloo"),
    "4 hosts, all across": (4, ALL, "gloo"),
}


def mapped_windows(pids: list[int]) -> set[str]:
    """Returns the anonymous files of ours that processes have mapped, by their inodes."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return set(re.findall(r" (\d+) +/memfd:megatron_samoe", maps))


@pytest.mark.parametrize("layout", first_by_day(LAYOUTS))
def test_losses_are_those_of_one_process(layout: str, cluster: Cluster, undisturbed: list[float]) -> None:
    num_hosts, options, transport = LAYOUTS[layout]
    hosts = [cluster.add() for _ in range(num_hosts)]
    job = Job(cluster, 2, **options)
    job.wait_for_step(3, 120)
    windows = [mapped_windows(host.processes()) for host in hosts]
    listening = {place for host in hosts for place in host.listening() if not place.startswith("10.77.0.")}
    assert len(listening) <= 2, (
        "torchrun's store and that of the ranks, whose address is a name, alone listen to all networks"
    )
    output = job.succeed(120)
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5)
    assert f"tokens travel through {transport}" in output or transport == "gloo"
    if "shared memory" in transport:
        assert all(windows) and len(set.union(*windows)) == sum(map(len, windows)), "hosts share no memory"


#: A model whose gradients and rows outweigh headers; its tensor parallelism stays inside hosts. What a layout sends between
#: hosts and gloo sends more often: it makes a reduce-scatter of an all-reduce, which sends twice as much.
SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "num_experts": 8}
COUNTED = {
    "dp": ({}, {"pool": 4 / 3}),
    "dp zero": ({"use_distributed_optimizer": True}, {"pool": 4 / 3, "gradients": 3 / 2}),
    "pp": ({"pipeline_model_parallel_size": 2}, {"pool": 4 / 3}),
    "ep": ({"expert_model_parallel_size": 2}, {"pool": 4 / 3}),
}


@night
@pytest.mark.parametrize("layout", COUNTED)
def test_the_planner_counts_what_goes_over_the_cables(layout: str, cluster: Cluster) -> None:
    """Headers, acknowledgements and small exchanges add at most three in a hundred; experts are loaded unevenly."""
    options, more = COUNTED[layout]
    options = {**SIZES, "tensor_model_parallel_size": 2, **options}
    write_corpus(cluster.shared / "data" / "corpus", num_documents=400)
    hosts = [cluster.add(), cluster.add()]
    flags = arguments(data_path=cluster.shared / "data" / "corpus", **{**OPTIONS, **options})
    planned = step_cost(parse_pretrain_args(flags), 257, Planned(4, 2, 1e12, 1e12, 1e9, 1e9))
    job = Job(cluster, 2, **options)
    job.wait_for_step(8, 200)
    first, before = job.step(), [host.sent_bytes() for host in hosts]
    job.wait_for_step(STEPS - 5, 200)
    last, after = job.step(), [host.sent_bytes() for host in hosts]
    job.succeed(100)
    expected = 2 * sum(sent * more.get(kind, 1.0) for kind, sent in planned.sent_bytes.items() if kind != "tensor")
    for start, end in zip(before, after, strict=True):
        counted = (end - start) / (last - first)
        print(f"{layout}: {counted:,.0f} bytes a step and host, {expected:,.0f} planned")
        assert 0.97 * expected < counted < (1.15 if layout == "ep" else 1.03) * expected


FEW_STEPS, VOCABULARY = 12, 257
#: What one rank of each host sends, and two.
RATE, WIDER = "50mbit", "200mbit"
MODEL: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64}
MODEL |= {"expert_layout": "moe", "num_expert_banks": None, "num_experts": 4}
MODEL |= {"micro_batch_size": 2, "train_iters": FEW_STEPS, "lr_decay_iters": FEW_STEPS}
#: gloo makes a reduce-scatter of an all-reduce, which sends twice as much: by kind, how much more than planned goes out.
OVER_A_LINK: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
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
    "dp 4, zero": OVER_A_LINK["dp, zero"],
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


@night
def test_six_layouts(cluster: Cluster) -> None:
    found = compare(cluster, 1, RATE, OVER_A_LINK)
    for name in ("dp", "dp, zero", "ep", "cp"):  # the link that was measured lets bursts through
        assert found[name][1] == pytest.approx(found[name][0], rel=0.25), name
    assert 0.85 < found["tp"][1] / found["tp"][0] < 2.0, (
        "messages of 64 KB, for each of which ranks wait for each other"
    )


@night
def test_four_layouts_of_four_ranks(cluster: Cluster) -> None:
    compare(cluster, 2, WIDER, ACROSS)
