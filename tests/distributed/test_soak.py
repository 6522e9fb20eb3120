"""Half an hour of everything that goes wrong: SAMOE_SOAK=1, or a number of minutes.

Kills of ranks, of agents and of hosts, pauses, and a full disk, at random, while between one and four hosts come and go. At
the end the losses are those of an undisturbed run, and nothing is left behind; no hand is on it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.test_launcher import children, is_running
from tests.distributed.test_restarts import Cluster, outside_store
from tests.harness.program import ProgramRun, arguments, records, start, write_corpus

__all__ = ["outside_store"]
MINUTES = float(os.environ.get("SAMOE_SOAK", "0").replace("true", "1"))
MINUTES = 30.0 if MINUTES == 1 else MINUTES
STEPS_PER_MINUTE = 300
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not MINUTES, reason="takes half an hour: SAMOE_SOAK=1 runs it, SAMOE_SOAK=5 five minutes of it"),
]
OPTIONS = {"eval_iters": 0, "save_interval": 50, "keep_last": 2, "lr": 1e-5, "log_interval": 1,
           "distributed_timeout_minutes": 0.5}  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB, which can be filled; a plain folder where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], capture_output=True).returncode == 0
    )
    yield disk
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


class Trouble:
    """What happens to a cluster; the same for one seed, but for the time that things take."""

    def __init__(self, cluster: Cluster, disk: Path, seed: int):
        self.cluster, self.disk, self.random = cluster, disk, random.Random(seed)
        self.happened: Counter[str] = Counter()

    @property
    def hosts(self) -> list[ProgramRun]:
        """Agents that run."""
        return [agent for agent in self.cluster.agents if agent.processes[0].exitcode is None]

    def finished(self) -> bool:
        """Whether an agent has ended well, which means that the job has."""
        return any(agent.processes[0].exitcode == 0 for agent in self.cluster.agents)

    def one(self) -> None:
        """Makes one thing happen; a host that was lost comes back sooner or later."""
        hosts = self.hosts
        if not hosts or (len(hosts) < 4 and self.random.random() < 0.35):
            self.happened["host added"] += 1
            self.cluster.add()
            return
        agent = self.random.choice(hosts).processes[0]
        what = self.random.choice(
            ("rank killed", "rank killed", "host killed", "agent ended", "rank paused", "disk full")
        )
        ranks = children(agent.pid)
        if what in ("host killed", "agent ended") and len(hosts) == 1:
            what = "rank killed"
        self.happened[what] += 1
        if what == "host killed":
            agent.kill()
        elif what == "agent ended":
            with suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGTERM)
        elif what == "rank killed" and ranks:
            with suppress(ProcessLookupError):
                os.kill(self.random.choice(ranks), signal.SIGKILL)
        elif what == "rank paused" and ranks:
            victim = self.random.choice(ranks)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGSTOP)
                time.sleep(self.random.uniform(1, 8))
                os.kill(victim, signal.SIGCONT)
        elif what == "disk full":
            filler = self.disk / "filler"
            with suppress(OSError), open(filler, "wb") as file:
                file.truncate(0)
                while file.write(bytes(1 << 20)):
                    file.flush()
            time.sleep(self.random.uniform(2, 6))
            filler.unlink(missing_ok=True)


@pytest.mark.night
def test_a_job_ends_as_if_nothing_had_happened(tmp_path: Path, small_disk: Path, outside_store: int) -> None:
    steps = round(MINUTES * STEPS_PER_MINUTE)
    corpus = write_corpus(tmp_path / "data" / "corpus", num_documents=4000)
    options = {"data_path": corpus, "train_iters": steps, **OPTIONS}
    start(arguments(run_dir=tmp_path / "undisturbed", **options), tmp_path).succeed(600)
    undisturbed = [r["lm_loss"] for r in records(tmp_path / "undisturbed/metrics.jsonl")]
    args = arguments(run_dir=small_disk / "run", elastic=True, expert_model_parallel_size=2, **options)
    cluster = Cluster(tmp_path / "out", outside_store, args, ",is_host=0", max_restarts=10_000)
    trouble = Trouble(cluster, small_disk, seed=int(os.environ.get("SAMOE_SOAK_SEED", "1")))
    began = time.monotonic()
    try:
        cluster.add()
        while not trouble.finished():
            assert time.monotonic() - began < 60 * (3 * MINUTES + 5), f"no end in sight: {trouble.happened}"
            if time.monotonic() - began < 60 * MINUTES:
                trouble.one()
            elif not trouble.hosts:
                cluster.add()
            until = time.monotonic() + trouble.random.uniform(3, 20)
            while time.monotonic() < until and not trouble.finished():
                time.sleep(0.2)
        deadline = time.monotonic() + 90
        while trouble.hosts and time.monotonic() < deadline:
            time.sleep(0.2)
        ranks = [pid for agent in cluster.agents for pid in children(agent.processes[0].pid)]
    finally:
        cluster.close()
    print(f"{dict(trouble.happened)} in {(time.monotonic() - began) / 60:.1f} min, {len(cluster.agents)} agents")
    logged = records(small_disk / "run/metrics.jsonl")
    assert [r["iteration"] for r in logged] == list(range(1, steps + 1))
    assert [r["lm_loss"] for r in logged] == pytest.approx(undisturbed, rel=1e-5)
    assert not [pid for pid in ranks if is_running(pid)]
    left = {path.name for path in (small_disk / "run/checkpoints").iterdir()}
    assert left == {"latest_checkpointed_iteration.txt", f"iter_{steps:07d}", f"iter_{steps - 50:07d}"}, left
    assert shutil.disk_usage(small_disk).used < 40e6
