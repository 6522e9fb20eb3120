"""The main job on real text, on one machine: `megatron-samoe quickstart`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megatron_samoe import children
from megatron_samoe.cli.program import program
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.report import ReportData, write_group_report
from megatron_samoe.evaluation.run_groups import group_runs, summary_table
from megatron_samoe.evaluation.run_summary import format_table, read_run
from megatron_samoe.language_model import load

DATA = Path(__file__).with_name("quickstart_data")
NOVELS, CONFIG = DATA / "austen_emma_mansfield.txt", DATA / "config.yaml"
PROGRAM = [sys.executable, "-m", "megatron_samoe"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Four experts of a quarter of the MLP's width are a little better for models of this size than two of a half
# (examples/studies/routing.yaml).
EXPERTS = ["--moe-router-topk", "4"]
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
#: Seconds between two looks at the trainings, and between two lines about them.
LOOK_S, SAY_S = 0.5, 20.0
NOTES = (
    "All models see the same samples in the same order. One seed only: two runs of one model that differ in nothing but "
    "rounding can end 0.02 nats apart, so a smaller difference between the rows says nothing.",
    "Checkpoints hold weights and moments in fp32: one moment for what Muon updates, two for all else. Memory is the "
    "process's resident peak, of which the Python process with torch loaded is a large part at this size.",
)


def argv(flags: str, *more: str) -> list[str]:
    """Returns the words of a command line, with further ones that may have spaces."""
    return [*flags.split(), *more]


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
        raise MegatronSamoeError(f"{step} ended with status {status}; its message is above.")
    print(f"   ({time.monotonic() - started:.0f} s)", flush=True)


def prepare_data(out: Path) -> list[str]:
    """Trains the tokenizer, makes the dataset, and returns the flags that name both."""
    tokenizer, prefix = out / "tokenizer/austen", out / "data/austen"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    kind = argv("--type sentencepiece-bpe --vocab-size 4096 --overwrite")
    run(
        [*PROGRAM, "train-tokenizer", "--input", str(NOVELS), "--output-prefix", str(tokenizer), *kind],
        "1/5 train a tokenizer",
    )
    cut = argv("--document-separator CHAPTER --append-eod --workers 2 --overwrite")
    model = argv("--tokenizer-type SentencePieceTokenizer --tokenizer-model", f"{tokenizer}.model")
    run(
        [*PROGRAM, "preprocess", "--input", str(NOVELS), "--output-prefix", str(prefix), *cut, *model],
        "2/5 make the dataset, a document per chapter",
    )
    return ["--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{tokenizer}.model"]


class Training:
    """One model's pretraining in a process of its own; what it says goes to a file.

    Args:
        steps: where it ends.
    """

    def __init__(self, name: str, command: list[str], steps: int, out: Path):
        self.name, self.steps, self._metrics, self._log = name, steps, out / name / "metrics.jsonl", out / f"{name}.log"
        self.began_at, _ = self.progress()
        with self._log.open("w") as log:
            self.process = children.start(command, env=environment(), stdout=log, stderr=log)

    def progress(self) -> tuple[int, str]:
        """Returns the last logged step and a few words on it."""
        lines = self._metrics.read_text().splitlines(True) if self._metrics.is_file() else []
        steps = [line for line in lines if '"lm_loss"' in line and line.endswith("\n")]
        if not steps:
            return 0, "starting"
        record = json.loads(steps[-1])
        return min(record["iteration"], self.steps), f"loss {record['lm_loss']:.3f}"

    def has_ended(self) -> bool:
        """Returns whether it is trained; MegatronSamoeError with what it said last if it failed."""
        status = self.process.poll()
        if status:
            tail = "\n".join(self._log.read_text().splitlines()[-5:])
            raise MegatronSamoeError(f"pretraining {self.name} ended with status {status}:\n{tail}")
        return status is not None


def train_side_by_side(commands: Mapping[str, tuple[list[str], int]], out: Path, ended: Callable[[str], None]) -> None:
    """Trains models, two at a time, and says from time to time how far they are.

    Args:
        commands: by the model's name, and the step at which each ends.
        ended: called with the name of each model that is trained.
    """
    for command, _ in commands.values():
        show(command)
    waiting, started, running = dict(commands), list[Training](), list[Training]()
    began = said = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < 2:
                name = next(iter(waiting))
                running.append(Training(name, *waiting.pop(name), out))
                started.append(running[-1])
            time.sleep(LOOK_S)
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                print(
                    _how_far(started, running, sum(steps for _, steps in commands.values()), said - began), flush=True
                )
            for training in [training for training in running if training.has_ended()]:
                running.remove(training)
                ended(training.name)
    finally:
        for training in started:
            training.process.terminate()


def _how_far(started: Sequence[Training], running: Sequence[Training], steps: int, seconds: float) -> str:
    found = {training: training.progress() for training in started}
    done = sum(step for step, _ in found.values())
    made = done - sum(training.began_at for training in started)
    after = f", about {timedelta(seconds=round(seconds * (steps - done) / made))} left" if made else ""
    each = "; ".join(f"{one.name} at step {found[one][0]}, {found[one][1]}" for one in running)
    return f"   {done:,} of {steps:,} steps{after}: {each}"


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """The main job on real text, on one machine: tokenizer, dataset, four pretraining runs, table, samples, report.

    Trains four GPTs with equal active parameters on two novels by Jane Austen, with the same data and steps: a dense one, a
    standard MoE, a SaMoE (one pool of expert banks that all layers combine) and the same pool without learning to combine it.
    Two run side by side, one thread each. The SaMoE's last steps are trained on two ranks with expert parallelism over gloo,
    which resume the checkpoint of one process. Everything is also shown as the command that a user would type.
    """

    output_dir: Path = Path("runs/quickstart")
    """where everything goes"""
    train_iters: int = 220
    """steps of each model"""

    def run(self) -> None:
        out, steps = self.output_dir, self.train_iters
        if steps <= PARALLEL_STEPS:
            raise ConfigError("--train-iters", steps, f"must be above {PARALLEL_STEPS}, the steps that two ranks train")
        common = [*prepare_data(out), "--train-iters", str(steps)]
        print("\n== 3/5 pretrain four models, two at a time", flush=True)
        config = ["--config", str(CONFIG)]
        commands = {}
        for name, flags in MODELS.items():
            last = steps - PARALLEL_STEPS * (name == FINISHED_BY_TWO)
            stop = ["--exit-interval", str(last)] if last < steps else []
            own = argv("--num-threads 1 --run-dir", str(out / name))
            commands[name] = [*PROGRAM, "pretrain", *config, *flags, *common, *stop, *own], last
        torch.set_num_threads(1)
        samples: dict[str, str] = {}

        def ended(name: str) -> None:
            if name != FINISHED_BY_TWO:
                samples[name] = sample(out / name)

        train_side_by_side(commands, out, ended)
        two = argv("--standalone --nproc-per-node 2 -m megatron_samoe pretrain")
        split = argv("--expert-model-parallel-size 2 --micro-batch-size 4 --run-dir", str(out / FINISHED_BY_TWO))
        run(
            [*TORCHRUN, *two, *config, *MODELS[FINISHED_BY_TWO], *common, *split],
            f"4/5 continue {FINISHED_BY_TWO} on two ranks, half of the experts on each, for its last {PARALLEL_STEPS} steps",
        )
        samples[FINISHED_BY_TWO] = sample(out / FINISHED_BY_TWO)
        report(out, samples)


def sample(folder: Path) -> str:
    """Returns what a trained model makes of the prompt, and shows it with its loss."""
    loss = read_run(folder).validation["validation_loss"]
    text = PROMPT + load(folder).generate(PROMPT, 60, temperature=0.8, top_k=40, seed=1)
    print(f"\n{folder.name}, validation loss {loss:.4f}: {text}\n", flush=True)
    return text


def report(out: Path, samples: Mapping[str, str]) -> None:
    """Prints the table and writes the page."""
    print("\n== 5/5 results")
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
    page = out / "report.html"
    data, title = ReportData(notes=notes, samples=samples), "Quickstart: dense, MoE and SaMoE on two novels"
    write_group_report(page, title, group_runs(list(runs.values())), data)
    print(
        f"\nreport: {page}\nnext: megatron-samoe generate --load {out / 'samoe'} --prompt 'Emma was', or serve --load {out / 'samoe'};"
    )
    print("      megatron-samoe init NAME --text FILE for a text of your own")


main = program(Quickstart)

if __name__ == "__main__":
    sys.exit(main())
