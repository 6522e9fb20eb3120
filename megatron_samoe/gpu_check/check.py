"""The check of a machine with a GPU, for half an hour: `make gpu-check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from megatron_samoe import children
from megatron_samoe.cli.quickstart import prepare_data
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.gpu_check.pieces import KERNELS, PIECES, NotHere, Piece, Row, Task, train
from megatron_samoe.gpu_check.tables import as_table
from megatron_samoe.ops.extension import CUDA_ENVIRONMENT_VARIABLE

#: Seconds of training at a time: a piece stays under ten minutes.
TRAINING_S = 540.0


@dataclass(frozen=True, kw_only=True)
class GpuCheck:
    """check and measure all there is on a machine with a GPU

    What half an hour should find out, in pieces of less than ten minutes each, in processes of their own: the tests for
    GPUs, waits, memory, ops and training steps next to what was predicted without a GPU, a profile, and at last a dense model,
    a MoE and a SaMoE of about 100 M active parameters, trained in turn until the time is up. A piece that is finished is not
    run again, and training resumes: start the command again with more minutes. `report.md` and the small
    JSON files in --output-dir are the result; `runs/` is not needed.
    """

    output_dir: Path = Path("runs/gpu-check")
    """where results go"""
    minutes: float = 28.0
    """to take in all, training included"""
    size: Literal["full", "tiny"] = "full"
    """tiny: a dry run, on a CPU too"""
    device: Literal["cuda", "cpu"] = "cuda"
    """what to measure"""
    pieces: tuple[Piece, ...] = get_args(Piece)
    """these only"""
    again: bool = False
    """run finished pieces, too"""
    data_path: str | None = None
    """dataset to train on; by default the quickstart's novels"""
    tokenizer_model: str | None = None
    """its tokenizer, of the type SentencePieceTokenizer"""

    def run(self) -> int:
        """Runs the pieces; returns 1 if one of them failed or found what was not predicted."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MegatronSamoeError(
                "torch sees no GPU here (megatron-samoe doctor says why); --device cpu --size tiny is a dry run."
            )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + 60 * self.minutes
        for name, (_, limit_s) in PIECES.items():
            if name not in self.pieces:
                continue
            if not self.again and is_finished(self.output_dir / f"{name}.json"):
                print(f"{name}: finished before")
                continue
            self._start_piece(name, min(limit_s, max(until - time.monotonic(), 30)))
        left = until - time.monotonic()
        while "train" in self.pieces and left > 20:
            if not self._start_piece("train", min(left, TRAINING_S)):
                break
            left = until - time.monotonic()
        return write_report(self.output_dir)

    def _start_piece(self, name: str, seconds: float) -> bool:
        """Runs a piece in a process of its own; returns whether it did not fail. Its end leaves a result in any case."""
        print(f"{name} (at most {seconds:.0f} s) ...", flush=True)
        kernels = KERNELS.get(name.split("-")[-1])
        environment = {**os.environ, **({CUDA_ENVIRONMENT_VARIABLE: kernels} if kernels else {})}
        task = {
            "name": name,
            "folder": str(self.output_dir),
            "device": self.device,
            "size": self.size,
            "seconds": seconds,
            "data_path": self.data_path,
            "tokenizer_model": self.tokenizer_model,
        }
        started, result = time.monotonic(), self.output_dir / f"{name}.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "megatron_samoe.gpu_check.check", json.dumps(task)]
        try:
            said = children.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 60)
            why = (said.stdout + said.stderr)[-1500:]
        except subprocess.TimeoutExpired:
            why = f"it took more than {seconds + 60:.0f} s"
        if not result.is_file():
            save(self.output_dir, name, {"state": "failed", "why": why, "rows": []})
        content = json.loads(result.read_text())
        why = f": {content['why'][-300:]}" if content["why"] else ""
        print(f"   {content['state']} in {time.monotonic() - started:.0f} s{why}", flush=True)
        return bool(content["state"] != "failed")


def is_finished(result: Path) -> bool:
    """Returns whether a piece has a result that is not a failure."""
    return result.is_file() and json.loads(result.read_text())["state"] != "failed"


def run_piece(
    name: Piece,
    folder: Path,
    device: str,
    size: str,
    seconds: float,
    data_path: str | None,
    tokenizer_model: str | None,
) -> None:
    """Runs a piece and saves its result."""
    data: list[str] = []
    if name in ("train", "profile"):
        data = ["--data-path", data_path, "--tokenizer-model", str(tokenizer_model)] if data_path else prepared(folder)
        data += ["--tokenizer-type", "SentencePieceTokenizer", "--split", "95,5,0"]
    task = Task(folder.resolve(), torch.device(device), size, seconds, tuple(data))
    piece = train if name == "train" else PIECES[name][0]
    started, rows, state, why = time.monotonic(), [], "ok", ""
    try:
        for row in piece(task):
            rows.append(row)
    except NotHere as error:
        state, why = "not here", str(error)
    except Exception as error:  # the other pieces run, and the result says what was found until then
        state, why = "failed", f"{type(error).__name__}: {error}"
    save(folder, name, {"state": state, "why": why, "seconds": round(time.monotonic() - started, 1), "rows": rows})


def prepared(folder: Path) -> list[str]:
    """Returns the flags of the quickstart's data, made once."""
    made = folder / "data.json"
    if not made.is_file():
        flags = prepare_data(folder / "runs")
        made.write_text(json.dumps(flags))
    found: list[str] = json.loads(made.read_text())
    return found


def save(folder: Path, name: str, content: Row) -> None:
    """Writes a result whole or not at all."""
    path = folder / f"{name}.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1, default=str) + "\n")
    fresh.replace(path)


def write_report(folder: Path) -> int:
    """Writes report.md of all results, prints it, and returns the exit status."""
    lines, is_good = ["# GPU check", ""], True
    for name in (*PIECES, "train"):
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
    told = json.loads(sys.argv[1])
    run_piece(**{**told, "folder": Path(told["folder"])})
