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
from tests.harness.tables import table
from tests.hosts.cluster import SHARED, Cluster
from tests.hosts.job import OPTIONS, STEPS, Job

pytestmark = pytest.mark.distributed

night = pytest.mark.night
TABLE = table(__file__)
#: Hosts of two ranks each, options, and what tokens travel through.
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = TABLE["layouts"]


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


@night
@pytest.mark.parametrize("layout", TABLE["counted"])
def test_the_planner_counts_what_goes_over_the_cables(layout: str, cluster: Cluster) -> None:
    """Headers, acknowledgements and small exchanges add at most three in a hundred; experts are loaded unevenly."""
    options, more = TABLE["counted"][layout]
    options = {**TABLE["counted model"], **options}
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


VOCABULARY = 257
#: What one rank of each host sends, and two.
RATE, WIDER = "50mbit", "200mbit"
MODEL: dict[str, Any] = TABLE["model"]


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
    agent = f"torchrun --nnodes=2 --nproc-per-node={num_ranks} --rdzv-backend=c10d --rdzv-endpoint=host0:29500 -m"
    runs = [host.start([*agent.split(), *map(str, words)]) for host in cluster.hosts]
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
    for name, options in layouts.items():
        cost = step_cost(config_of(cluster, options), VOCABULARY, known)
        exchanges_s = sum(cost.seconds[kind] for kind in cost.sent_bytes)
        step_s, waited_s = run(cluster, num_ranks, name.replace(", ", "-").replace(" ", ""), options)
        found[name] = exchanges_s, waited_s, cost.step_s, step_s
        exchanges = f"exchanges {exchanges_s:.2f} s planned, {waited_s:.2f} s waited"
        print(f"{name}: {exchanges}; step {cost.step_s:.2f} s planned, {step_s:.2f} s")
    for one, other in combinations(found.values(), 2):
        near = abs(one[2] - other[2]) < 0.2 * max(one[2], other[2])
        assert near or (one[2] < other[2]) == (one[3] < other[3]), found
    return found


@night
def test_six_layouts(cluster: Cluster) -> None:
    found = compare(cluster, 1, RATE, TABLE["over a link"])
    for name in ("dp", "dp, zero", "ep", "cp"):  # the link that was measured lets bursts through
        assert found[name][1] == pytest.approx(found[name][0], rel=0.25), name
    assert 0.85 < found["tp"][1] / found["tp"][0] < 2.0, (
        "messages of 64 KB, for each of which ranks wait for each other"
    )


@night
def test_four_layouts_of_four_ranks(cluster: Cluster) -> None:
    compare(cluster, 2, WIDER, TABLE["across"])
