"""What goes wrong between hosts, and a job that outlives it: the losses of an undisturbed run, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time

import pytest

from tests.harness.program import iterations
from tests.hosts.cluster import SHARED, Cluster, Host
from tests.hosts.job import STEPS, Job

pytestmark = pytest.mark.distributed
night = pytest.mark.night
#: A lost rank is noticed after six seconds.
OPTIONS = {"expert_model_parallel_size": 2, "save_interval": 10, "distributed_timeout_minutes": 0.1}


def two_hosts(cluster: Cluster, **options: object) -> tuple[Job, Host, Host]:
    first, second = cluster.add(), cluster.add()
    return Job(cluster, **{**OPTIONS, **options}), first, second


def unfinished(job: Job) -> list[str]:
    return [path.name for path in (job.cluster.shared / "run" / "checkpoints").glob(".*") if path.name != ".lock"]


def assert_as_if_nothing_had_been(job: Job, undisturbed: list[float], repeated: range = range(1)) -> None:
    """Asserts the losses of one process, so many steps trained twice, and whole checkpoints alone."""
    output = job.succeed(90)
    assert job.losses() == pytest.approx(undisturbed, rel=1e-5)
    assert output.count("lm loss: ") - STEPS in repeated, output
    assert iterations(job.cluster.shared / "run" / "checkpoints") == [STEPS - 10, STEPS] and not unfinished(job)


def test_a_cable_that_is_out_for_seconds(cluster: Cluster, undisturbed: list[float]) -> None:
    job, _, second = two_hosts(cluster)
    job.wait_for_step(5)
    second.cable(False)
    time.sleep(2)
    second.cable(True)
    assert_as_if_nothing_had_been(job, undisturbed)


@pytest.mark.parametrize("seconds", [pytest.param(15, marks=night), pytest.param(60, marks=night)])
def test_a_cable_that_is_out_for_longer_than_ranks_wait(
    seconds: float, cluster: Cluster, undisturbed: list[float]
) -> None:
    """The host's agent waits for torchrun's store, and comes back by itself."""
    job, _, second = two_hosts(cluster)
    job.wait_for_step(12)
    second.cable(False)
    print(f"found after {job.wait_for('lost another rank'):.0f} s")
    time.sleep(seconds)
    second.cable(True)
    job.wait_for_step(STEPS, 120)
    assert_as_if_nothing_had_been(job, undisturbed, range(1, 11))


def test_a_host_that_loses_power_and_a_spare_with_an_empty_disk(cluster: Cluster, undisturbed: list[float]) -> None:
    job, _, second = two_hosts(cluster)
    job.wait_for_step(12)
    second.lose()
    del job.agents["host1"]
    job.start(cluster.add())
    assert_as_if_nothing_had_been(job, undisturbed, range(1, 11))
    assert len(re.findall("loaded .*iter_0000010", job.output())) == 1


@night
def test_the_host_that_has_the_store_is_lost(cluster: Cluster, undisturbed: list[float]) -> None:
    """The job ends, and goes on when it is started again. torchrun waits for TCP to give up, which is the system's choice."""
    job, first, second = two_hosts(cluster)
    second.run("sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
    job.wait_for_step(12)
    first.lose()
    del job.agents["host0"]
    found = job.wait_for("No answer comes from host0, which may have lost its power or its link")
    began = time.monotonic()
    assert job.agents["host1"].wait(90) != (0,)
    print(f"found after {found:.0f} s, ended {time.monotonic() - began:.0f} s later")
    assert not second.processes()
    again = Job(cluster, hosts=[second, cluster.add()], **OPTIONS)
    assert_as_if_nothing_had_been(again, undisturbed, range(1, 11))


@night  # beside much other work an agent gives up before its rank is heard of
def test_a_cut_in_the_middle_of_a_save(cluster: Cluster, undisturbed: list[float]) -> None:
    job, _, second = two_hosts(cluster)
    job.wait(lambda: bool(unfinished(job)), 120, pause_s=0.001)
    second.cable(False)
    job.wait_for("lost another rank")
    second.cable(True)
    assert_as_if_nothing_had_been(job, undisturbed, range(12))


def test_gloo_on_an_interface_that_leads_nowhere(cluster: Cluster) -> None:
    """A host's name means another interface on itself: found at the start, by name. Of two, gloo's higher address calls."""
    first, _ = cluster.add(), cluster.add()
    first.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "nowhere")
    first.run("ip", "link", "set", "eth1", "up")
    first.run("ip", "address", "add", "10.76.0.1/24", "dev", "eth1")
    wrong = cluster.folder / "wrong-names"
    wrong.write_text(cluster.names.read_text().replace("10.77.0.1 ", "10.76.0.1 "))
    first.run("mount", "--bind", wrong, "/etc/hosts")
    job = Job(cluster, **OPTIONS)
    job.wait_for("GLOO_SOCKET_IFNAME", 90)
    said = r"^error.*gloo could not connect them: rank 1 .host1.: .*unreachable GLOO_SOCKET_IFNAME names"
    assert job.step() == 0 and re.search(said, job.output(), re.MULTILINE), job.output()


@night
def test_a_full_disk_of_a_host(cluster: Cluster, undisturbed: list[float]) -> None:
    """Its temporary folder has no byte left when its rank dies and is started again."""
    _, second = cluster.add(), cluster.add()
    second.run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", second.folder / "tmp")
    job = Job(cluster, **OPTIONS)
    job.wait_for_step(12)
    second.run("sh", "-c", f"dd if=/dev/zero of={second.folder}/tmp/filler bs=4k 2>/dev/null || true")
    os.kill(max(second.processes()), signal.SIGKILL)
    assert_as_if_nothing_had_been(job, undisturbed, range(1, 11))


@night
@pytest.mark.parametrize("number", [0, 1])
def test_storage_that_cannot_be_written_for_a_moment(number: int, cluster: Cluster, undisturbed: list[float]) -> None:
    hosts = cluster.add(), cluster.add()
    job = Job(cluster, **OPTIONS)
    job.wait_for_step(12)
    checkpoints = SHARED / "run" / "checkpoints"
    hosts[number].run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", checkpoints)
    job.wait_for("Read-only file system")
    hosts[number].run("umount", "-l", checkpoints)
    assert_as_if_nothing_had_been(job, undisturbed, range(1, 12))


@night
@pytest.mark.skipif(shutil.which("bindfs") is None, reason="bindfs is not installed")
def test_storage_that_serves_what_was_there_before(cluster: Cluster, undisturbed: list[float]) -> None:
    """A host takes files for missing, and folders for what they were, for ten seconds, as caches of NFS do."""
    _, second = cluster.add(), cluster.add()
    before = set(second.processes())
    cached = "attr_timeout=10,entry_timeout=10,negative_timeout=10"
    second.run("bindfs", "--multithreaded", "--enable-lock-forwarding", "-o", cached, SHARED, SHARED)
    second.services = set(second.processes()) - before
    second.run("sh", "-c", f"ls {SHARED}/run/checkpoints {SHARED}/run/checkpoints/.lock || true")
    job = Job(cluster, **{**OPTIONS, "distributed_timeout_minutes": 0.5})
    job.wait_for_step(12)
    os.kill(max(set(second.processes()) - second.services), signal.SIGKILL)
    assert_as_if_nothing_had_been(job, undisturbed, range(1, 11))
