"""Hosts that differ are refused before a step, by an error on each host that names the host and the difference; a spare of an elastic job
alone, and the job goes on.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping

import pytest

from tests.harness.program import REPOSITORY, write_corpus
from tests.harness.tables import table
from tests.hosts.cluster import SHARED, Cluster, Host
from tests.hosts.job import QUICK, STEPS, Job

pytestmark = pytest.mark.distributed
night = pytest.mark.night

#: What is other on a host: files that lie over others, flags, environment, and what the error says of it and the first host.
DIFFERENCES: dict[str, tuple[dict[str, str], str, dict[str, str], str]] = table(__file__)
#: Hosts that are left wait twenty seconds for others: a spare on a busy machine comes in time.
CONF = QUICK.replace("last_call_timeout=60", "last_call_timeout=20")
BY_DAY = ("configuration", "folder")


def make_different(host: Host, covered: Mapping[str, str], cluster: Cluster) -> None:
    write_corpus(cluster.shared / "data" / "other", num_documents=41)
    (cluster.shared / "run" / "checkpoints").mkdir(parents=True)
    (cluster.shared / "empty").mkdir()
    places = {"package": REPOSITORY / "megatron_samoe", "shared": SHARED}
    for path, other in covered.items():
        host.run("mount", "--bind", other.format(**places), path.format(**places))


@pytest.mark.parametrize("what", [name if name in BY_DAY else pytest.param(name, marks=night) for name in DIFFERENCES])
def test_a_host_that_differs_is_named(what: str, cluster: Cluster) -> None:
    covered, flags, environment, problem = DIFFERENCES[what]
    hosts = [cluster.add(), cluster.add()]
    make_different(hosts[1], covered, cluster)
    job = Job(cluster, start=False, save_interval=10, distributed_timeout_minutes=0.2)
    job.start(hosts[0])
    job.start(hosts[1], *flags.split(), **environment)
    problem = problem.replace("HOST", "host1").replace("FIRST", "host0")
    for name, agent in job.agents.items():
        assert agent.wait(60) != (0,), f"{name}:\n{job.output()}"
    for agent in job.agents.values():  # each host has a log, which its user reads
        output = agent.output()
        said = re.findall(r"^error.*?: (.*(?:\n  .*)*)", output, re.MULTILINE)
        assert re.search(problem, output) and all(re.search(problem, paragraph) for paragraph in said), job.output()
        assert "attempts left" not in output
    assert job.step() == 0 and not any(host.processes() for host in hosts)


@night
@pytest.mark.parametrize("what", DIFFERENCES)
@pytest.mark.parametrize("place", [0, 2])
def test_a_spare_that_differs_is_refused(what: str, place: int, cluster: Cluster, undisturbed: list[float]) -> None:
    """Torchrun gives ranks by names of hosts, so a spare may be the first of them."""
    if what == "flag":
        pytest.skip("the parser writes no paragraph")
    if (what, place) == ("folder", 2):
        pytest.skip("a host that stands by does not save: its folder is compared when it takes part")
    covered, flags, environment, problem = DIFFERENCES[what]
    hosts = [cluster.add() for _ in range(3)]
    spare = hosts.pop(place)
    make_different(spare, covered, cluster)
    options = {"save_interval": 10, "distributed_timeout_minutes": 1.0}
    job = Job(cluster, start=False, hosts=[*hosts, spare], conf=CONF, **options)
    for host in hosts:
        job.start(host)
    job.wait_for_step(3)
    paused = max(hosts[1].processes())
    os.kill(paused, signal.SIGSTOP)
    run = job.start(spare, *flags.split(), **environment)
    job.wait_for("closing signal SIGTERM")  # which a host's torchrun sends when it sees the spare
    os.kill(paused, signal.SIGCONT)
    del job.agents[spare.name]
    output = job.succeed(120)
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5)
    assert run.wait(20) != (0,) and not spare.processes()
    said = re.findall(r"^error.*?: (.*(?:\n  .*)*)", run.output(), re.MULTILINE)
    problem = problem.replace("HOST", spare.name).replace("FIRST", hosts[0].name)
    assert len(said) == 1 and re.search(problem, said[0]), run.output()
    assert re.search(f"^error.*{spare.name} cannot take part in this job, which continues", output, re.MULTILINE), (
        output
    )
    assert output.count("lm loss: ") == STEPS, "no step was repeated"
