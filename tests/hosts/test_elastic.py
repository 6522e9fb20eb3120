"""Hosts leave and come, and the losses stay those of one process, whose batches grow and whose pool is locked meanwhile."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest

from tests.harness.program import arguments, losses, start
from tests.harness.tables import table
from tests.hosts.cluster import Cluster
from tests.hosts.job import OPTIONS, QUICK, Job

pytestmark = pytest.mark.distributed
night = pytest.mark.night

MODELS: dict[str, dict[str, Any]] = table(__file__)
#: Hosts that are left wait ten seconds for others.
CONF = QUICK.replace("last_call_timeout=60", "last_call_timeout=10")


def repeated(job: Job) -> int:
    """Returns how many steps were trained twice so far."""
    steps = re.findall(r"iteration +(\d+)/", job.output())
    return len(steps) - len(set(steps))


@night
@pytest.mark.parametrize("model", MODELS)
def test_four_hosts_become_two_and_four_again(model: str, cluster: Cluster) -> None:
    """Two lose their power, which costs the steps since the last checkpoint; two come, which costs none."""
    options = {**OPTIONS, **MODELS[model]}
    one = cluster.folder / "one"
    start(arguments(data_path=cluster.shared / "data" / "corpus", run_dir=one / "run", **options), one).succeed()
    hosts = [cluster.add() for _ in range(4)]
    options = {"expert_model_parallel_size": 4, "save_interval": 5, "distributed_timeout_minutes": 0.2, **MODELS[model]}
    job = Job(cluster, conf=CONF, **options)
    job.wait_for_step(7)
    for host in hosts[2:]:
        host.lose()
        del job.agents[host.name]
    job.wait_for("2 of 2 ranks work")
    job.wait(lambda: job.output().partition("2 of 2 ranks work")[2].count("lm loss") > 4)
    lost = repeated(job)
    for _ in range(2):
        job.start(cluster.add())
    output = job.succeed(120)
    assert "4 of 4 ranks work" in output.partition("2 of 2 ranks work")[2], output
    assert job.losses() == pytest.approx(losses(one / "run" / "metrics.jsonl"), rel=1e-5)
    print(f"{model}: {lost} steps were repeated after the loss, {repeated(job) - lost} after hosts came")
    assert lost <= 5 and repeated(job) == lost, output


def test_a_host_that_is_told_to_leave(cluster: Cluster, undisturbed: list[float]) -> None:
    """The others go on from what all have saved: no step is repeated. The first host goes, and the ranks' store with it."""
    first, second = cluster.add(), cluster.add()
    job = Job(cluster, hosts=[second, first], conf=CONF, expert_model_parallel_size=2, distributed_timeout_minutes=0.2)
    job.wait_for_step(5)
    job.agents.pop("host0").signal(signal.SIGTERM)
    job.wait_for("SIGTERM came to rank 0 (host0) and not to this rank", 30)
    output = job.succeed(90)
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5) and repeated(job) == 0, output
    assert re.search(r"2 of 2 ranks work.*1 of 1 ranks work", output, re.DOTALL) and not first.processes(), output


def test_a_rank_that_is_told_to_leave(cluster: Cluster, undisturbed: list[float]) -> None:
    """Not its torchrun, which starts it again: all have saved before."""
    _, second = cluster.add(), cluster.add()
    job = Job(cluster, conf=CONF, expert_model_parallel_size=2, distributed_timeout_minutes=0.2)
    job.wait_for_step(5)
    os.kill(max(second.processes()), signal.SIGTERM)
    output = job.succeed(90)
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5) and repeated(job) == 0, output
    assert output.count("2 of 2 ranks work") == 2 and "signal 15 received by rank 1 (host1)" in output, output
