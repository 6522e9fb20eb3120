"""The commands of examples/pretrain_slurm.sh on several hosts: the losses of one process, and what goes over the cables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.job import Job

pytestmark = pytest.mark.distributed
night = pytest.mark.night
#: Tensor parallelism lies inside a host; what else is there crosses.
LAYOUTS = [
    pytest.param(2, True, {"expert_model_parallel_size": 4}, "shared memory and torch", id="2 hosts, experts across"),
    pytest.param(
        2, True, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "gloo", id="2 hosts, stages across",
        marks=night,
    ),
    pytest.param(
        4, True, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True}, "gloo", id="4 hosts, all across", marks=night,
    ),
    pytest.param(4, False, {"expert_model_parallel_size": 4}, "shared memory and torch", id="4 hosts, cold", marks=night),
]  # fmt: skip


def mapped_windows(pids: list[int]) -> set[str]:
    """Returns the anonymous files of ours that processes have mapped, by their inodes."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return set(re.findall(r" (\d+) +/memfd:megatron_samoe", maps))


@pytest.mark.parametrize(("num_hosts", "warm", "options", "transport"), LAYOUTS)
def test_losses_are_those_of_one_process(
    num_hosts: int,
    warm: bool,
    options: Mapping[str, object],
    transport: str,
    cluster: Cluster,
    undisturbed: list[float],
) -> None:
    hosts = [cluster.add() for _ in range(num_hosts)]
    job = Job(cluster, 2, warm, conf="last_call_timeout=60", **options)
    job.wait_for_step(3, 120)
    windows = [mapped_windows(host.processes()) for host in hosts]
    output = job.succeed(120)
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5)
    assert f"tokens travel through {transport}" in output or transport == "gloo"
    if "shared memory" in transport:
        assert all(windows) and len(set.union(*windows)) == sum(map(len, windows)), "hosts share no memory"
