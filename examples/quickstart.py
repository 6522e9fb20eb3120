#!/usr/bin/env python3
"""The main job on real text, on one machine: tokenizer, dataset, two pretraining runs, table, samples, report.

Trains a standard MoE GPT and a SaMoE GPT (one pool of expert banks shared by all layers) on two novels by Jane Austen,
with the same data, steps and active parameters, on two ranks with expert parallelism over gloo. Everything it does is
also shown as the command that a user would type. Usage: python examples/quickstart.py [--train-iters N] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.report import write_report
from megatron_samoe.evaluation.run_summary import format_table, read_run, summary_table
from megatron_samoe.inference.generate import generate_text
from megatron_samoe.inference.load import load_model
from megatron_samoe.parallel_state import single_process_state

ROOT = Path(__file__).resolve().parents[1]
NOVELS = ROOT / "examples/data/austen_emma_mansfield.txt"
CONFIG = ROOT / "examples/configs/quickstart.yaml"
NUM_BANKS = 2
MODELS = {"moe": [], "samoe": ["--expert-layout", "samoe", "--num-expert-banks", str(NUM_BANKS)]}
PROMPT = "Emma was very much surprised to find that Mr. Knightley"
NOTES = (
    "Both models see the same samples in the same order. One seed only: two runs of one model that differ in nothing but "
    "rounding can end 0.02 nats apart, so a smaller difference between the rows says nothing.",
    "Checkpoints hold weights and Adam's two moments in fp32. Memory is the process's resident peak, "
    "of which the Python process with torch loaded is a large part at this size.",
)


def run(command: list[str], step: str) -> None:
    """Shows and runs a command; leaves with its status if it fails."""
    shown = [str(part).removeprefix(f"{ROOT}/") for part in command]
    shown[0] = "python" if shown[0] == sys.executable else shown[0]
    print(f"\n== {step}\n$ {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    # Said here, torchrun does not warn that it sets it; each rank then takes its share of the cores.
    status = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    if status != 0:
        sys.exit(f"error: {step} ended with status {status}; its message stands above.")
    print(f"   ({time.monotonic() - started:.0f} s)", flush=True)


def prepare_data(out: Path) -> list[str]:
    """Trains the tokenizer, makes the dataset, and returns the flags that name both."""
    tokenizer, prefix = out / "tokenizer/austen", out / "data/austen"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    run(
        [sys.executable, "tools/train_tokenizer.py", "--type", "sentencepiece-bpe", "--input", str(NOVELS),
         "--vocab-size", "4096", "--output-prefix", str(tokenizer)],
        "1/5 train a tokenizer",
    )  # fmt: skip
    run(
        [sys.executable, "tools/preprocess_data.py", "--input", str(NOVELS), "--document-separator", "CHAPTER",
         "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{tokenizer}.model", "--append-eod",
         "--workers", "2", "--output-prefix", str(prefix)],
        "2/5 make the dataset, a document per chapter",
    )  # fmt: skip
    return ["--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{tokenizer}.model"]


def main() -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/quickstart", help="where everything goes")
    parser.add_argument("--train-iters", type=int, help="fewer or more steps than the configuration's")
    arguments = parser.parse_args()
    out: Path = arguments.out
    data_flags = prepare_data(out)
    extra = [] if arguments.train_iters is None else ["--train-iters", str(arguments.train_iters)]
    for number, (name, flags) in enumerate(MODELS.items(), start=3):
        run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "megatron_samoe.cli.pretrain", "--config", str(CONFIG), *flags, *data_flags, *extra,
             "--run-dir", str(out / name)],
            f"{number}/5 pretrain {name}",
        )  # fmt: skip
    report(out)


def report(out: Path) -> None:
    """Prints table and samples and writes the page."""
    print("\n== 5/5 results")
    torch.set_num_threads(1)
    runs = [read_run(out / name) for name in MODELS]
    table = format_table(summary_table(runs))
    fewer = runs[0].parameters.expert / runs[1].parameters.expert
    gap = runs[1].validation["validation_loss"] - runs[0].validation["validation_loss"]
    notes = (
        f"SaMoE has {fewer:.1f}x fewer expert parameters; its validation loss is {gap:+.4f} nats from the MoE's.",
        *NOTES,
    )
    print(f"{table}\n\n" + "\n".join(notes))
    samples = {}
    for name in MODELS:
        loaded = load_model(str(out / name / "checkpoints"), single_process_state())
        samples[name] = PROMPT + generate_text(loaded, PROMPT, 60, temperature=0.8, top_k=40, seed=1)
        print(f"\n{name}: {samples[name]}")
    page = out / "report.html"
    write_report(page, "Quickstart: MoE and SaMoE on two novels", runs, notes, samples)
    print(f"\nreport: {page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}")


if __name__ == "__main__":
    try:
        main()
    except MegatronSamoeError as error:
        sys.exit(f"error: {error}")
