"""Faults between hosts at random, others each day: SAMOE_HOSTS_SEED=7 draws those of a seed, which a failure names."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.hosts.cluster import Cluster, Host
from tests.hosts.job import STEPS, Job

pytestmark = [pytest.mark.distributed, pytest.mark.night]
FAULTS = ("cable out", "rank killed", "rank told to leave", "rank paused", "host lost")
SIGNALS = {"rank killed": signal.SIGKILL, "rank told to leave": signal.SIGTERM, "rank paused": signal.SIGSTOP}


def drawn(seed: int, count: int = 5) -> list[tuple[int, str, int, int]]:
    """Returns faults in their order: the step after which one happens, what, to which host, and for how many seconds. The first host
    has the store, and keeps its power and its cable."""
    dice, found = random.Random(seed), []
    for step in sorted(dice.sample(range(2, STEPS - 4), count)):
        what = dice.choice(FAULTS)
        found.append((step, what, dice.randrange(0 if what.startswith("rank") else 1, 3), dice.choice((1, 3, 10))))
    return found


def harm(cluster: Cluster, job: Job, hosts: list[Host], what: str, number: int, seconds: int) -> None:
    """Makes a fault; a host that is lost is replaced by another."""
    host = hosts[number]
    ranks = sorted(host.processes())[1:]
    if what == "cable out":
        host.cable(False)
        time.sleep(seconds)
        host.cable(True)
    elif what == "host lost":
        host.lose()
        job.agents.pop(host.name)
        hosts[number] = cluster.add()
        job.start(hosts[number])
    elif ranks:
        os.kill(ranks[-1], SIGNALS[what])
        if what == "rank paused":
            time.sleep(seconds)
            os.kill(ranks[-1], signal.SIGCONT)


def test_a_job_outlives_faults_at_random(cluster: Cluster, undisturbed: list[float]) -> None:
    """Agents that ended badly are started again. Those that are done wait five minutes for those of lost hosts."""
    seed = int(os.environ.get("SAMOE_HOSTS_SEED", time.strftime("%j")))
    faults = drawn(seed)
    said = f"SAMOE_HOSTS_SEED={seed}: {faults}"
    hosts = [cluster.add() for _ in range(3)]
    job = Job(cluster, expert_model_parallel_size=2, save_interval=5, distributed_timeout_minutes=0.1)
    until = time.monotonic() + 300 + 300
    while job.step() < STEPS or job.agents["host0"].processes[0].exitcode != 0:
        assert time.monotonic() < until, f"{said}\n{job.output()}"
        if faults and job.step() >= faults[0][0]:
            harm(cluster, job, hosts, *faults.pop(0)[1:])
        for host in hosts:
            if job.agents[host.name].processes[0].exitcode not in (0, None) and job.step() < STEPS:
                job.start(host)
        time.sleep(0.1)
    print(f"{said}\n{job.output().count('lm loss: ') - STEPS} steps were repeated")
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5), said
