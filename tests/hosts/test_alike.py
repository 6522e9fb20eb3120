"""Hosts that differ are refused before a step, by one error that names the host and the difference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.harness.program import REPOSITORY, write_corpus
from tests.hosts.cluster import SHARED, Cluster
from tests.hosts.job import Job

pytestmark = pytest.mark.distributed
night = pytest.mark.night

PACKAGE = REPOSITORY / "megatron_samoe"
#: What is other on host1: files that lie over others, flags, environment, and what the error says of it.
DIFFERENCES = {
    "configuration": ({}, ["--lr", "3e-4"], {}, r"--lr = '0.0003 on host1 \(rank 1\)': must be alike .* is 0.0001 on host0"),
    "layout": ({}, ["--pipeline-model-parallel-size", "2"], {}, r"--pipeline-model-parallel-size = '2 on host1"),
    "illegal": ({}, ["--hidden-size", "15"], {}, r"--num-attention-heads"),
    "version": ({PACKAGE / "moved.py": PACKAGE / "log.py"}, [], {}, r"megatron_samoe = '.*, files \w+ on host1"),
    "build": ({}, [], {"MEGATRON_SAMOE_ISA": "avx2"}, r"MEGATRON_SAMOE_ISA = 'avx2 on host1 .* is missing on host0"),
    "data": ({SHARED / "data/corpus.bin": SHARED / "data/other.bin"}, [], {}, r"corpus.bin = '[\d,]+ bytes, \w+ on host1"),
    "no data": ({SHARED / "data": SHARED / "empty"}, [], {}, r"corpus.bin = 'No such file or directory on host1"),
    "cores": ({}, ["--num-threads", "2"], {}, r"threads of a rank .* = '2 on host1"),
    "folder": ({SHARED / "run/checkpoints": SHARED / "empty"}, [], {}, r"must be a folder that all hosts share: .* host1"),
}  # fmt: skip
BY_DAY = ("configuration", "folder")


@pytest.mark.parametrize("what", [name if name in BY_DAY else pytest.param(name, marks=night) for name in DIFFERENCES])
def test_a_host_that_differs_is_named(what: str, cluster: Cluster) -> None:
    covered: Mapping[Path, Path]
    flags: Sequence[str]
    covered, flags, environment, problem = DIFFERENCES[what]
    hosts = [cluster.add(), cluster.add()]
    write_corpus(cluster.shared / "data" / "other", num_documents=41)
    (cluster.shared / "run" / "checkpoints").mkdir(parents=True)
    (cluster.shared / "empty").mkdir()
    for path, other in covered.items():
        hosts[1].run("mount", "--bind", other, path)
    job = Job(cluster, start=False, save_interval=10, distributed_timeout_minutes=0.2)
    job.start(hosts[0])
    job.start(hosts[1], *flags, **environment)
    for name, agent in job.agents.items():
        assert agent.wait(60) != (0,), f"{name}:\n{job.output()}"
    output = job.output()
    said = re.findall(r"^error.*?: (.*(?:\n  .*)*)", output, re.MULTILINE)
    assert said and all(re.search(problem, paragraph) for paragraph in said), output
    assert job.step() == 0 and not any(host.processes() for host in hosts)
