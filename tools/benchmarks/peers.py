"""Other programs as contestants: worker processes that are asked in turn with ours.

A peer script is a Python file of the user's, here w1_moe_layer.py (a layer) or w2_train_step.py (a training step) in the
folder of --peers. `script --worker NAME --OPTION VALUE ...` prints a line of "@@" and a JSON object when it is ready; then
each line on its input is answered so: "build DTYPE EXPERTS TOPK" (layers only) with facts, or {"err": why}; "go" with the
seconds of one run as "s" or "t".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_samoe import children
from megatron_samoe.errors import ConfigError
from tools.benchmarks.harness import ProcessBenchmark, Row


class LineWorker:
    """A process that answers each line with a line of "@@" and a JSON object, and is ready when it gives the first."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], stderr: int | None = None):
        self.name = name
        self.process = children.start(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | environment,
        )
        self.facts = self._answer()

    def _answer(self) -> Row:
        """Returns the next answer; {"err": why} where the process has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@"):
                answer: Row = json.loads(line[2:])
                return answer
        return {"err": f"ended with status {self.process.wait()}"}

    def ask(self, line: str) -> Row:
        """Returns the answer to a line."""
        if self.process.poll() is not None:
            return {"err": "has ended"}
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def seconds(self) -> float:
        """Returns the seconds of one run."""
        answer = self.ask("go")
        return float(answer.get("s") or answer.get("t") or "nan")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True, kw_only=True)
class PeerBenchmark(ProcessBenchmark):
    """One in which other programs take part."""

    not_told: ClassVar[tuple[str, ...]] = ("peer_python",)

    peers: Path | None = None
    """folder of peer scripts, see tools/benchmarks/peers.py"""
    peer_names: tuple[str, ...] | None = None
    """workers of the script to run; default: what it may know"""
    peer_python: str | None = None
    """interpreter of the peers; default: this one"""

    @contextmanager
    def running(self, script: str, names: Sequence[str], sizes: dict[str, Any]) -> Iterator[list[LineWorker]]:
        """Gives the peers that started; says which did not. None where there is not a folder."""
        if self.peers is None:
            yield []
            return
        path = self.peers / script
        if not path.exists():
            raise ConfigError("--peers", self.peers, f"a folder with {script}")
        threads = str(torch.get_num_threads())
        arguments = [text for key, value in (sizes | {"threads": threads}).items() for text in (f"--{key}", str(value))]
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        workers = []
        for name in self.peer_names or names:
            command = [self.peer_python or sys.executable, str(path), "--worker", name, *arguments]
            workers.append(LineWorker(name, command, environment, subprocess.DEVNULL))
        try:
            for worker in workers:
                if "err" in worker.facts:
                    print(f"{worker.name} did not start: {worker.facts['err']}")
            yield [worker for worker in workers if "err" not in worker.facts]
        finally:
            for worker in workers:
                worker.close()
