"""The check of a machine with a GPU: `make gpu-check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from megatron_samoe import children
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.gpu_check.pieces import PIECES, NotHere, Row, Task
from megatron_samoe.gpu_check.tables import as_table
from megatron_samoe.ops.extension import CUDA_ENVIRONMENT_VARIABLE
from megatron_samoe.parsing import write_atomically

#: Pieces that run with our kernels, and with torch's, by the end of their names.
KERNELS = {"kernels": "1", "torch": "0"}


@dataclass(frozen=True, kw_only=True)
class GpuCheck:
    """check and measure all there is on a machine with a GPU

    In pieces of less than ten minutes each, in processes of their own: the tests for GPUs, waits, memory, ops and training
    steps of models with about 100 M active parameters next to what was predicted without a GPU, and a profile. A piece that is
    finished is not run again. `report.md` and the small JSON files in --output-dir are the result.
    """

    output_dir: Path = Path("runs/gpu-check")
    """where results go"""
    size: Literal["full", "tiny"] = "full"
    """tiny: a dry run, on a CPU too"""
    device: Literal["cuda", "cpu"] = "cuda"
    """what to measure"""
    pieces: Annotated[tuple[Literal[tuple(PIECES)], ...], tyro.conf.arg(metavar="PIECE [PIECE ...]")] = tuple(PIECES)  # type: ignore[valid-type]
    """these only"""
    again: bool = False
    """run finished pieces, too"""

    def run(self) -> int:
        """Runs the pieces; returns 1 if the result of any, also of an earlier run, failed or differs from what was predicted."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MegatronSamoeError(
                "torch sees no GPU here (megatron-samoe doctor says why); --device cpu --size tiny is a dry run."
            )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for name in PIECES:
            result = self.output_dir / f"{name}.json"
            if name in self.pieces and not self.again and is_finished(result):
                print(f"{name}: finished before")
            elif name in self.pieces:
                self._run_piece(name, result)
        return write_report(self.output_dir)

    def _run_piece(self, name: str, result: Path) -> None:
        """Runs a piece in a process of its own, whose end leaves a result in any case."""
        seconds = PIECES[name][1]
        print(f"{name} (at most {seconds:.0f} s) ...", flush=True)
        kernels = KERNELS.get(name.split("-")[-1])
        environment = {**os.environ, **({CUDA_ENVIRONMENT_VARIABLE: kernels} if kernels else {})}
        started = time.monotonic()
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "megatron_samoe.gpu_check.check", name, str(result), self.device, self.size]
        try:
            said = children.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 60)
            why = (said.stdout + said.stderr)[-1500:]
        except subprocess.TimeoutExpired:
            why = f"it took more than {seconds + 60:.0f} s"
        if not result.is_file():
            save(result, "failed", why, [])
        content = json.loads(result.read_text())
        why = f": {content['why'][-300:]}" if content["why"] else ""
        print(f"   {content['state']} in {time.monotonic() - started:.0f} s{why}", flush=True)


def is_finished(result: Path) -> bool:
    """Returns whether a piece has a result that is not a failure."""
    return result.is_file() and json.loads(result.read_text())["state"] != "failed"


def measure(name: str, result: Path, device: str, size: str) -> None:
    """Runs a piece and saves its result."""
    piece, seconds = PIECES[name]
    rows, state, why = list[Row](), "ok", ""
    try:
        for row in piece(Task(torch.device(device), size, seconds)):
            rows.append(row)
    except NotHere as error:
        state, why = "not here", str(error)
    except Exception as error:  # the other pieces run, and the result says what was found until then
        state, why = "failed", f"{type(error).__name__}: {error}"
    save(result, state, why, rows)


def save(result: Path, state: str, why: str, rows: list[Row]) -> None:
    """Writes a result completely or not at all."""
    content = {"state": state, "why": why, "rows": rows}
    write_atomically(result, json.dumps(content, indent=1, default=str) + "\n")


def write_report(folder: Path) -> int:
    """Writes report.md of all results, prints it, and returns the exit status."""
    lines, is_good = ["# GPU check", ""], True
    for name in PIECES:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        rows = content["rows"]
        wrong = [row for row in rows if row.get("holds") is False]
        is_good = is_good and content["state"] != "failed" and not wrong
        lines += [f"## {name}: {content['state']}{', not as predicted' if wrong else ''}", ""]
        lines += [content["why"], ""] if content["why"] else []
        shown = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
        lines += ["    " + line for line in as_table(shown).splitlines()] if shown else []
        lines.append("")
    (folder / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))
    return 0 if is_good else 1


if __name__ == "__main__":  # a piece, in a process of its own
    name, path, *task = sys.argv[1:]
    measure(name, Path(path), *task)
