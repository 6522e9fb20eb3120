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
from pathlib import Path
from typing import Any

from megatron_samoe.errors import ConfigError


class Peer:
    """One worker process."""

    def __init__(self, script: Path, name: str, options: dict[str, int], python: str, threads: int):
        self.name = name
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        self.process = subprocess.Popen(
            [python, str(script), "--worker", name, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@"):
                return json.loads(line[2:])
        return {"err": f"ended with status {self.process.wait()}"}

    def ask(self, line: str) -> dict[str, Any]:
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
        return float(answer.get("s", answer.get("t", "nan")))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def running(
    folder: Path | None, script: str, names: Sequence[str], options: dict[str, int], python: str | None, threads: int
) -> Iterator[list[Peer]]:
    """Gives the peers that started; says which did not. None where there is no folder."""
    if folder is None:
        yield []
        return
    path = folder / script
    if not path.exists():
        raise ConfigError("--peers", folder, f"a folder with {script}")
    peers = [Peer(path, name, options, python or sys.executable, threads) for name in names]
    try:
        for peer in peers:
            if "err" in peer.facts:
                print(f"{peer.name} did not start: {peer.facts['err']}")
        yield [peer for peer in peers if "err" not in peer.facts]
    finally:
        for peer in peers:
            peer.close()
