"""The main job on real text, on one machine: tokenizer, dataset, four pretraining runs, table, samples, report.

`megatron-samoe quickstart` trains four GPTs with equal active parameters on two novels by Jane Austen, with the same
data and steps: a dense one, a standard MoE, a SaMoE (one pool of expert banks that all layers combine) and the same pool
without learning to combine it. Two run side by side, one thread each. The SaMoE's last steps are trained on two ranks
with expert parallelism over gloo, which resume the checkpoint of one process. Everything is also shown as the command
that a user would type.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from megatron_samoe import children
from megatron_samoe.cli.arguments import Words, adder, program, text_parser
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.report import write_report
from megatron_samoe.evaluation.run_summary import format_table, read_run, summary_table
from megatron_samoe.language_model import load

DATA = Path(__file__).with_name("quickstart_data")
NOVELS, CONFIG = DATA / "austen_emma_mansfield.txt", DATA / "config.yaml"
PROGRAM = [sys.executable, "-m", "megatron_samoe"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Four experts of a quarter of the MLP's width, and a start weaker than its, are a little better for models of this size
# than the defaults: docs/routing.md.
EXPERTS = ["--moe-router-topk", "4", "--no-moe-scale-output-init"]
POOL = [*EXPERTS, "--expert-layout", "samoe", "--num-expert-banks", "2"]
MODELS = {
    "dense": ["--expert-layout", "dense"],
    "moe": EXPERTS,
    "samoe": POOL,
    "frozen-sharing": [*POOL, "--samoe-freeze-coefficients"],
}
#: The model whose last steps two ranks train.
FINISHED_BY_TWO, PARALLEL_STEPS = "samoe", 20
PROMPT = "Emma was very much surprised to find that Mr. Knightley"
NOTES = (
    "All models see the same samples in the same order. One seed only: two runs of one model that differ in nothing but "
    "rounding can end 0.02 nats apart, so a smaller difference between the rows says nothing.",
    "Checkpoints hold weights and Adam's two moments in fp32. Memory is the process's resident peak, "
    "of which the Python process with torch loaded is a large part at this size.",
)


def show(command: list[str]) -> None:
    """Shows a command as a user would type it."""
    name = "torchrun" if command[: len(TORCHRUN)] == TORCHRUN else "megatron-samoe"
    print(f"$ {shlex.join([name, *command[len(PROGRAM) :]])}", flush=True)


def environment() -> dict[str, str]:
    """Returns the environment of a run: a thread for each rank, as torchrun sets it where nobody chose."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def run(command: list[str], step: str) -> None:
    """Shows and runs a command; leaves with its status if it fails."""
    print(f"\n== {step}", flush=True)
    show(command)
    started = time.monotonic()
    status = children.run(command, env=environment()).returncode
    if status != 0:
        raise MegatronSamoeError(f"{step} ended with status {status}; its message stands above.")
    print(f"   ({time.monotonic() - started:.0f} s)", flush=True)


def prepare_data(out: Path) -> list[str]:
    """Trains the tokenizer, makes the dataset, and returns the flags that name both."""
    tokenizer, prefix = out / "tokenizer/austen", out / "data/austen"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    run(
        [*PROGRAM, "train-tokenizer", "--type", "sentencepiece-bpe", "--input", str(NOVELS),
         "--vocab-size", "4096", "--output-prefix", str(tokenizer), "--overwrite"],
        "1/5 train a tokenizer",
    )  # fmt: skip
    run(
        [*PROGRAM, "preprocess", "--input", str(NOVELS), "--document-separator", "CHAPTER",
         "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{tokenizer}.model", "--append-eod",
         "--workers", "2", "--output-prefix", str(prefix), "--overwrite"],
        "2/5 make the dataset, a document per chapter",
    )  # fmt: skip
    return ["--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{tokenizer}.model"]


class Training:
    """One model's pretraining in a process of its own; what it says goes to a file."""

    def __init__(self, name: str, flags: list[str], out: Path):
        self.name, self.run_dir, self.log = name, out / name, out / f"{name}.log"
        command = [
            *PROGRAM,
            "pretrain",
            "--config",
            str(CONFIG),
            *flags,
            "--run-dir",
            str(self.run_dir),
            "--num-threads",
            "1",
        ]
        show(command)
        with self.log.open("w") as log:
            self.process = children.start(command, env=environment(), stdout=log, stderr=log)

    def progress(self) -> str:
        """Returns a few words on the last logged step."""
        path = self.run_dir / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.is_file() else []
        if not lines:
            return f"{self.name}: starting"
        record = json.loads(lines[-1])
        return f"{self.name}: step {record['iteration']}, loss {record['lm_loss']:.3f}"

    def refuse_failure(self) -> None:
        """Leaves with what the run said last if it failed."""
        if self.process.returncode:
            tail = "\n".join(self.log.read_text().splitlines()[-5:])
            raise MegatronSamoeError(f"pretraining {self.name} ended with status {self.process.returncode}:\n{tail}")


def train_side_by_side(waiting: list[tuple[str, list[str]]], out: Path, at_once: int = 2) -> None:
    """Trains models, two at a time, and says every now and then how far they are."""
    running: list[Training] = []
    said, last = time.monotonic(), ""
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Training(*waiting.pop(0), out))
            time.sleep(0.2)
            for training in [t for t in running if t.process.poll() is not None]:
                training.refuse_failure()
                print(f"   {training.progress()} (done)", flush=True)
                running.remove(training)
            if time.monotonic() - said > 20 and running:
                said, before = time.monotonic(), last
                last = " | ".join(training.progress() for training in running)
                if last != before:
                    print(f"   {last}", flush=True)
    finally:
        for training in running:
            training.process.terminate()


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    add = adder(parser)
    add("--output-dir", str, "where everything goes", default="runs/quickstart")
    add("--train-iters", int, "steps of each model", default=320)
    return parser


@program
def main(words: Words) -> None:
    """Runs all steps."""
    options = make_parser().parse_args(words)
    out, steps = Path(options.output_dir), options.train_iters
    if steps <= PARALLEL_STEPS:
        raise ConfigError("--train-iters", steps, f"must be above {PARALLEL_STEPS}, the steps that two ranks train")
    common = [*prepare_data(out), "--train-iters", str(steps)]
    print("\n== 3/5 pretrain four models, two at a time", flush=True)
    stop = {FINISHED_BY_TWO: ["--exit-interval", str(steps - PARALLEL_STEPS)]}
    train_side_by_side([(name, [*flags, *common, *stop.get(name, [])]) for name, flags in MODELS.items()], out)
    run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "megatron_samoe", "pretrain",
         "--config", str(CONFIG), *MODELS[FINISHED_BY_TWO], *common,
         "--expert-model-parallel-size", "2", "--micro-batch-size", "8", "--run-dir", str(out / FINISHED_BY_TWO)],
        f"4/5 go on with {FINISHED_BY_TWO} on two ranks, half of the experts on each, for its last {PARALLEL_STEPS} steps",
    )  # fmt: skip
    report(out)


def report(out: Path) -> None:
    """Prints table and samples and writes the page."""
    print("\n== 5/5 results")
    torch.set_num_threads(1)
    runs = {name: read_run(out / name) for name in MODELS}
    losses = {name: run.validation["validation_loss"] for name, run in runs.items()}
    fewer = runs["moe"].parameters.expert / runs["samoe"].parameters.expert
    gaps = ", ".join(f"{name} {losses[name] - losses['dense']:+.4f}" for name in MODELS if name != "dense")
    notes = (
        f"Validation loss from the dense model's, in nats: {gaps}. "
        f"The two pools have {fewer:.1f}x fewer expert parameters than the MoE.",
        *NOTES,
    )
    print(f"{format_table(summary_table(list(runs.values())))}\n\n" + "\n".join(notes))
    samples = {}
    for name in MODELS:
        samples[name] = PROMPT + load(out / name).generate(PROMPT, 60, temperature=0.8, top_k=40, seed=1)
        print(f"\n{name}: {samples[name]}")
    page = out / "report.html"
    write_report(page, "Quickstart: dense, MoE and SaMoE on two novels", list(runs.values()), notes, samples)
    print(f"\nreport: {page}")


if __name__ == "__main__":
    sys.exit(main())
