"""The commands of examples/pretrain_slurm.sh on several hosts: the losses of one process, and what goes over the cables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.planning.layout_cost import Cluster as Planned
from megatron_samoe.planning.layout_cost import step_cost
from tests.harness.pairs import first_by_day
from tests.harness.program import arguments, write_corpus
from tests.hosts.cluster import Cluster
from tests.hosts.job import OPTIONS, STEPS, Job

pytestmark = pytest.mark.distributed
night = pytest.mark.night
#: Tensor parallelism lies inside a host; what else is there crosses.
EXPERTS = {"expert_model_parallel_size": 4}
STAGES = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
ALL = {**STAGES, "expert_model_parallel_size": 2, "use_distributed_optimizer": True}
LAYOUTS = {
    "2 hosts, experts across": (2, True, EXPERTS, "shared memory and torch"),
    "2 hosts, stages across": (2, True, STAGES, "gloo"),
    "4 hosts, all across": (4, True, ALL, "gloo"),
    "4 hosts, cold": (4, False, EXPERTS, "shared memory and torch"),
}


def mapped_windows(pids: list[int]) -> set[str]:
    """Returns the anonymous files of ours that processes have mapped, by their inodes."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return set(re.findall(r" (\d+) +/memfd:megatron_samoe", maps))


@pytest.mark.parametrize("layout", first_by_day(LAYOUTS))
def test_losses_are_those_of_one_process(layout: str, cluster: Cluster, undisturbed: list[float]) -> None:
    num_hosts, warm, options, transport = LAYOUTS[layout]
    hosts = [cluster.add() for _ in range(num_hosts)]
    job = Job(cluster, 2, warm, **options)
    job.wait_for_step(3, 120)
    windows = [mapped_windows(host.processes()) for host in hosts]
    listening = {place for host in hosts for place in host.listening() if not place.startswith("10.77.0.")}
    assert listening <= {"*:29400"}, "torchrun's own store alone listens to all networks"
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
