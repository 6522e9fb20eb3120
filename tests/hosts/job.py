"""A job as examples/pretrain_slurm.sh starts it: an agent on each host."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.harness.program import REPOSITORY, ProgramRun, arguments, records
from tests.hosts.cluster import SHARED, Cluster, Host

STEPS = 40
#: Of every job here: a batch that two, four and eight ranks can share.
OPTIONS: dict[str, Any] = {"train_iters": STEPS, "lr_decay_iters": STEPS}
OPTIONS |= {"eval_iters": 0, "lr": 1e-4, "micro_batch_size": 1}
#: A dead agent is noticed after seconds. Hosts wait a minute for others, not less: this machine may be busy.
QUICK = "last_call_timeout=60,keep_alive_interval=2,keep_alive_max_attempt=4"


def slurm_words(folder: Path, hosts: Sequence[Host], num_ranks: int, flags: list[str]) -> list[str]:
    """Returns what the script for Slurm has srun start on every host."""
    tools = folder / "slurm"
    tools.mkdir(exist_ok=True)
    (tools / "scontrol").write_text("#!/bin/sh\n" + "".join(f"echo {host.name}\n" for host in hosts))
    (tools / "srun").write_text("#!/bin/sh\nshift\nenv | grep ^TORCH_ >&2\nprintf '%s\\n' \"$@\"\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (folder / "empty.yaml").write_text("training:\n  seed: 1234\n")
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "host[0-9]",
        "SLURM_NNODES": str(len(hosts)),
        "SLURM_GPUS_ON_NODE": str(num_ranks),
        "SLURM_JOB_ID": "7",
    }
    words = ["bash", "examples/pretrain_slurm.sh", folder / "empty.yaml", SHARED / "run", *flags]
    environment = {**os.environ, **slurm}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "srun hands the environment on"
    return done.stdout.splitlines()


class Job:
    """A training job on the hosts of a cluster.

    Args:
        num_ranks: of each host.
        hosts: the first one has the store; all of the cluster if not given.
        conf: of torchrun's rendezvous, besides the script's.
        start: whether its agents are started at once.
        options: of the program.
    """

    def __init__(
        self,
        cluster: Cluster,
        num_ranks: int = 1,
        hosts: Sequence[Host] = (),
        conf: str = QUICK,
        start: bool = True,
        **options: Any,
    ):
        self.cluster, hosts = cluster, hosts or cluster.hosts
        flags = arguments(data_path=SHARED / "data" / "corpus", **{**OPTIONS, **options})
        words = slurm_words(cluster.folder, hosts, num_ranks, flags)
        words[words.index("--rdzv-conf") + 1] += f",{conf}"
        self._words = words
        self.agents: dict[str, ProgramRun] = {}
        for host in hosts if start else ():
            self.start(host)

    def start(self, host: Host, *flags: str, **environment: str) -> ProgramRun:
        """Starts the job's agent on a host, with flags of the program on this host alone."""
        run = host.start([*self._words, *flags], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment)
        self.agents[host.name] = run
        return run

    def output(self) -> str:
        """Returns what all hosts have printed."""
        return "".join(
            path.read_text(errors="replace") for path in sorted(self.cluster.folder.glob("host*/output-*.txt"))
        )

    def step(self) -> int:
        """Returns the last step that was logged."""
        return max(map(int, re.findall(r"iteration +(\d+)/", self.output())), default=0)

    def wait(self, what: Callable[[], bool], timeout_s: float = 60.0, pause_s: float = 0.05) -> float:
        """Waits until something is so, and returns how long that took."""
        began = time.monotonic()
        while not what():
            ended = all(agent.processes[0].exitcode is not None for agent in self.agents.values())
            assert not ended or what(), f"the job has ended:\n{self.output()}"
            assert time.monotonic() < began + timeout_s, f"not within {timeout_s} s:\n{self.output()}"
            time.sleep(pause_s)
        return time.monotonic() - began

    def wait_for_step(self, step: int, timeout_s: float = 60.0) -> float:
        """Waits until a step was logged."""
        return self.wait(lambda: self.step() >= step, timeout_s)

    def wait_for(self, words: str, timeout_s: float = 60.0) -> float:
        """Waits until a host has printed these words."""
        return self.wait(lambda: words in self.output(), timeout_s)

    def succeed(self, timeout_s: float = 60.0) -> str:
        """Waits until all agents have ended well, and nothing of the job is left on a host; returns what they printed."""
        for name, agent in self.agents.items():
            statuses = agent.wait(timeout_s)
            assert statuses == (0,), f"{name} ended with {statuses}:\n{self.output()}"
        for host in self.cluster.hosts:
            assert host.name not in self.agents or set(host.processes()) <= host.services, host.name
        return self.output()

    def losses(self) -> list[float]:
        """Returns the loss of every step."""
        logged = records(self.cluster.shared / "run" / "metrics.jsonl")
        assert [record["iteration"] for record in logged] == list(range(1, STEPS + 1))
        return [record["lm_loss"] for record in logged]
