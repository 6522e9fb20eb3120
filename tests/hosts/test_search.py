"""Faults between hosts at random, others each day: SAMOE_HOSTS_SEED=7 draws those of a seed, SAMOE_HOSTS_REPLAY=FILE repeats a log.

Each is a line of JSON: the step after which it happens, what happens, to which host, and for how many seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import Cluster
from tests.hosts.job import STEPS, Job

pytestmark = [pytest.mark.distributed, pytest.mark.night]
FAULTS = ("cable out", "rank killed", "rank told to leave", "rank paused", "host lost")
SIGNALS = {"rank killed": signal.SIGKILL, "rank told to leave": signal.SIGTERM, "rank paused": signal.SIGSTOP}


def drawn(seed: int, count: int = 5) -> list[dict[str, Any]]:
    """Returns faults in the order of their steps. The first host has the store, and keeps its power and its cable."""
    dice, found = random.Random(seed), []
    for step in sorted(dice.sample(range(2, STEPS - 4), count)):
        what = dice.choice(FAULTS)
        found.append(
            {
                "step": step,
                "what": what,
                "host": dice.randrange(0 if what.startswith("rank") else 1, 3),
                "seconds": dice.choice((1, 3, 10)),
            }
        )
    return found


class Operator:
    """Whoever runs a job: makes faults, and starts an agent again where one has ended."""

    def __init__(self, cluster: Cluster, job: Job):
        self.cluster, self.job = cluster, job
        self.places = list(cluster.hosts)

    def make(self, what: str, number: int, seconds: float) -> None:
        host = self.places[number]
        ranks = sorted(host.processes())[1:]
        if what == "cable out":
            host.cable(False)
            time.sleep(seconds)
            host.cable(True)
        elif what == "host lost":
            host.lose()
            self.job.agents.pop(host.name)
            self.places[number] = self.cluster.add()
            self.job.start(self.places[number])
        elif ranks:
            os.kill(ranks[-1], SIGNALS[what])
            if what == "rank paused":
                time.sleep(seconds)
                os.kill(ranks[-1], signal.SIGCONT)

    def tend(self) -> Iterator[None]:
        """Starts agents that ended badly again, until all have ended well.

        Agents that are done wait five minutes for those of lost hosts.
        """
        until = time.monotonic() + 300 + 300
        while any(agent.processes[0].exitcode != 0 for agent in self.job.agents.values()):
            assert time.monotonic() < until, self.job.output()
            for host in self.places:
                if self.job.agents[host.name].processes[0].exitcode not in (0, None) and self.job.step() < STEPS:
                    self.job.start(host)
            yield
            time.sleep(0.1)
            if self.job.step() == STEPS and self.job.agents["host0"].processes[0].exitcode == 0:
                return


def test_a_job_outlives_faults_at_random(cluster: Cluster, undisturbed: list[float]) -> None:
    replay = os.environ.get("SAMOE_HOSTS_REPLAY")
    faults = drawn(int(os.environ.get("SAMOE_HOSTS_SEED", time.strftime("%j"))))
    if replay:
        faults = [json.loads(line) for line in Path(replay).read_text().splitlines()]
    for _ in range(3):
        cluster.add()
    job = Job(cluster, expert_model_parallel_size=2, save_interval=5, distributed_timeout_minutes=0.1)
    operator = Operator(cluster, job)
    log = cluster.folder / "faults.jsonl"
    for _ in operator.tend():
        if faults and job.step() >= faults[0]["step"]:
            fault = faults.pop(0)
            with log.open("a") as file:
                file.write(json.dumps(fault) + "\n")
            operator.make(fault["what"], fault["host"], fault["seconds"])
    print(f"{log}:\n{log.read_text()}{job.output().count('lm loss: ') - STEPS} steps were repeated")
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5), log.read_text()
