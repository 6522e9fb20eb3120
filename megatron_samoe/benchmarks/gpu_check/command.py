"""What half an hour on a machine with a GPU should find out: `make gpu-check`.

Pieces of less than ten minutes each, in processes of their own: the tests for GPUs, waits, memory, ops and training steps
beside what was predicted without a GPU, a profile, and at last a dense model, a MoE and a SaMoE of about 100 M active
parameters, trained in turn until the time is up. A piece that is finished is not run again, and training goes on where it
stopped: start the command again with more minutes. `report.md` and the small JSON files in --output-dir are the result;
`runs/` is not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_samoe import children
from megatron_samoe.benchmarks.common import add_alone, as_table
from megatron_samoe.benchmarks.gpu_check.models import SIZES
from megatron_samoe.benchmarks.gpu_check.pieces import KERNELS, PIECES, NotHere, Row, Task, train
from megatron_samoe.cli.arguments import Options
from megatron_samoe.cli.quickstart import prepare_data
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.ops.extension import CUDA_ENVIRONMENT_VARIABLE

#: Seconds of training at a time: a piece stays under ten minutes.
TRAINING_S = 540.0


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    add = add_alone(
        commands, "gpu-check", "check and measure all there is on a machine with a GPU", run, description=__doc__
    )
    add("--output-dir", Path, "where results go", default=Path("runs/gpu-check"))
    add("--minutes", 28.0, "to take in all, training included")
    add("--size", tuple(SIZES), "tiny: a dry run, on a CPU too")
    add("--device", ("cuda", "cpu"), "what to measure")
    add("--pieces", [(*PIECES, "train")], "these alone", default=[*PIECES, "train"])
    add("--again", bool, "run finished pieces, too")
    add("--data-path", str, "dataset to train on; by default the quickstart's novels")
    add("--tokenizer-model", str, "its tokenizer, of the type SentencePieceTokenizer")
    add("--piece", str, argparse.SUPPRESS)
    add("--seconds", 0.0, argparse.SUPPRESS)


def run(options: Options) -> int:
    """Runs the pieces; returns 1 if one of them failed or found what was not predicted."""
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if options.piece:
        run_piece(options, folder)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MegatronSamoeError(
            "torch sees no GPU here (megatron-samoe doctor says why); --device cpu --size tiny is a dry run."
        )
    until = time.monotonic() + 60 * options.minutes
    for name, (_, limit_s) in PIECES.items():
        if name not in options.pieces:
            continue
        if not options.again and is_finished(folder / f"{name}.json"):
            print(f"{name}: finished before")
            continue
        start_piece(options, folder, name, min(limit_s, max(until - time.monotonic(), 30)))
    left = until - time.monotonic()
    while "train" in options.pieces and left > 20:
        if not start_piece(options, folder, "train", min(left, TRAINING_S)):
            break
        left = until - time.monotonic()
    return write_report(folder)


def is_finished(result: Path) -> bool:
    """Returns whether a piece has a result that is no failure."""
    return result.is_file() and json.loads(result.read_text())["state"] != "failed"


def start_piece(options: Options, folder: Path, name: str, seconds: float) -> bool:
    """Runs a piece in a process of its own, and returns whether it did not fail. Its end leaves a result in any case."""
    print(f"{name} (at most {seconds:.0f} s) ...", flush=True)
    command = [sys.executable, "-m", "megatron_samoe", "benchmark", "gpu-check", "--piece", name, "--seconds", str(seconds),
               "--output-dir", str(folder), "--size", options.size, "--device", options.device]  # fmt: skip
    for flag in ("data_path", "tokenizer_model"):
        if getattr(options, flag):
            command += [f"--{flag.replace('_', '-')}", getattr(options, flag)]
    kernels = KERNELS.get(name.split("-")[-1])
    environment = {**os.environ, **({CUDA_ENVIRONMENT_VARIABLE: kernels} if kernels else {})}
    started, result = time.monotonic(), folder / f"{name}.json"
    result.unlink(missing_ok=True)
    try:
        said = children.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 60)
        why = (said.stdout + said.stderr)[-1500:]
    except subprocess.TimeoutExpired:
        why = f"it took more than {seconds + 60:.0f} s"
    if not result.is_file():
        save(folder, name, {"state": "failed", "why": why, "rows": []})
    content = json.loads(result.read_text())
    print(
        f"   {content['state']} in {time.monotonic() - started:.0f} s{': ' if content['why'] else ''}{content['why'][-300:]}",
        flush=True,
    )
    return bool(content["state"] != "failed")


def run_piece(options: Options, folder: Path) -> None:
    """Runs a piece and saves its result."""
    data: list[str] = []
    if options.piece in ("train", "profile"):
        if options.data_path:
            data = ["--data-path", options.data_path, "--tokenizer-model", options.tokenizer_model]
        else:
            data = prepared(folder)
        data += ["--tokenizer-type", "SentencePieceTokenizer", "--split", "95,5,0"]
    task = Task(folder.resolve(), torch.device(options.device), options.size, options.seconds, tuple(data))
    piece = train if options.piece == "train" else PIECES[options.piece][0]
    started, rows, state, why = time.monotonic(), [], "ok", ""
    try:
        for row in piece(task):
            rows.append(row)
    except NotHere as error:
        state, why = "not here", str(error)
    except Exception as error:  # the other pieces go on, and the result says what was found until then
        state, why = "failed", f"{type(error).__name__}: {error}"
    save(
        folder,
        options.piece,
        {"state": state, "why": why, "seconds": round(time.monotonic() - started, 1), "rows": rows},
    )


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
