"""Somebody on the hosts' network, without a password: what listens there, and what comes of trying it."""

from __future__ import annotations

import re
import sys

import pytest

from tests.hosts.cluster import Cluster, Host
from tests.hosts.job import Job

pytestmark = [pytest.mark.distributed, pytest.mark.night]
OPTIONS = {
    "expert_model_parallel_size": 2,
    "distributed_timeout_minutes": 0.2,
    "train_iters": 100_000,
    "lr_decay_iters": 100_000,
}


def trying(stranger: Host, what: str, *places: str) -> str:
    return stranger.start([sys.executable, "-u", "-m", "tests.hosts.stranger", what, *places]).succeed(90)


def test_what_a_stranger_can_do(cluster: Cluster) -> None:
    """docs/cluster.md has this as a table. What torch opens stays open; noise disturbs nobody."""
    hosts, stranger = (cluster.add(), cluster.add()), cluster.add()
    job = Job(cluster, start=False, hosts=hosts, **OPTIONS)
    for host in hosts:
        job.start(host, agent=["--local-addr", host.address])
    job.wait_for_step(3)
    found = set.union(*(host.listening() for host in hosts))
    assert {place for place in found if not place.startswith("10.77.0.")} == {"*:29400"}, "torchrun's own store alone"
    store, *others = sorted(found, key=lambda place: not place.startswith("*"))
    places = [store.replace("*", hosts[0].address), *others]
    print(trying(stranger, "noise", *places))
    step = job.step()
    job.wait_for_step(step + 20)
    assert "error" not in job.output(), job.output()
    keys = trying(stranger, "keys", f"{hosts[0].address}:29400")
    port = re.findall("MASTER_PORT b'(.*)'", keys)[0]
    keys = trying(stranger, "keys", f"{hosts[0].address}:{port}")
    assert "--lr" in keys and "meeting/here/0" in keys, (
        "options, paths and versions of the job, and what its ranks agree on"
    )
    assert not list(cluster.folder.glob("host*/tmp/a-stranger-was-here"))
    trying(stranger, "code", f"{hosts[0].address}:29400")
    for host in hosts:
        job.agents[host.name].wait(60)
    assert len(list(cluster.folder.glob("host*/tmp/a-stranger-was-here"))) == 2, "torchrun unpickles what its store has"
