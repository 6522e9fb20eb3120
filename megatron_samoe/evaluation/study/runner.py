"""Makes the runs of a study, one process at a time; started again, it goes on where it was."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from megatron_samoe.config.cli import from_mapping, parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.run_summary import read_records, sharing_text
from megatron_samoe.evaluation.study.definition import Run, Study, plan_runs

#: Groups that decide what a run computes, but for the fields that do not; others may change between two starts.
DECISIVE_GROUPS = ("model", "moe", "training", "optimizer")
INDECISIVE_FIELDS = ("num_threads", "exit_interval", "exit_duration_in_mins", "skip_train")


@dataclass(frozen=True)
class StudyRunner:
    """Runs a study.

    Attributes:
        root: folder of all runs.
        common_flags: of pretraining, for every run: corpus, tokenizer, whatever the study's file leaves open.
        say: shows a line.
    """

    study: Study
    root: Path
    common_flags: tuple[str, ...]
    say: Callable[[str], None] = print

    def check(self) -> None:
        """Raises ConfigError if a run's configuration cannot be read, its folder holds another run, or what is to be
        edited will not fit."""
        for run in self.plan():
            if not run.variant.is_trained:
                self._check_edit(run)
            else:
                config = self.config_of(run)
                if config.training.eval_iters == 0:
                    raise ConfigError("--eval-iters", 0, "a study compares validation losses; it must be positive")
                self._refuse_another(run, config)

    def plan(self) -> list[Run]:
        """Returns the runs in their order."""
        return plan_runs(self.study, self.root)

    def flags_of(self, run: Run) -> list[str]:
        """Returns the flags of a run's pretraining."""
        # A variant's own come last: a flag for every run must not make two variants one.
        study_flags = ["--config", str(self.study.config), *self.common_flags, *run.variant.flags]
        return [*study_flags, "--seed", str(run.seed), "--run-dir", str(run.directory)]

    def config_of(self, run: Run) -> PretrainConfig:
        """Returns the configuration of a trained run."""
        return parse_pretrain_args(self.flags_of(run), prog=f"run {run.variant.name!r} of the study")

    def is_finished(self, run: Run) -> bool:
        """Returns whether a run has its last checkpoint and that checkpoint's validation loss."""
        iterations = store.whole_iterations(run.checkpoints)
        if not iterations or last_validation(run) is None:
            return False
        return not run.variant.is_trained or iterations[-1] >= self.config_of(run).training.train_iters

    def run_all(self) -> list[str]:
        """Makes every run that is not finished; returns what was said of those that failed, which stop no other.

        Raises:
            MegatronSamoeError: a run was stopped; the study can be started again.
        """
        plan, failures = self.plan(), []
        for number, run in enumerate(plan, start=1):
            label = f"{number}/{len(plan)} {run.variant.name}, seed {run.seed}"
            if self.is_finished(run):
                self.say(f"{label}: finished before")
                continue
            started = time.monotonic()
            try:
                self._make(run)
            except MegatronSamoeError as error:
                failures.append(f"{label}: {error}")
                self.say(f"{label}: failed")
                continue
            if not self.is_finished(run):
                raise MegatronSamoeError(
                    f"{label} was stopped before its end; the same command goes on from its last checkpoint. "
                    f"Its output is in {run.directory / 'log.txt'}."
                )
            self.say(f"{label}: validation loss {last_validation(run):.4f} ({time.monotonic() - started:.0f} s)")
        return failures

    def _make(self, run: Run) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        if run.variant.is_trained:
            self._command(run, ["-m", "megatron_samoe.cli.pretrain", *self.flags_of(run)])
        else:
            self._edit(run)

    def _source_of(self, run: Run) -> Run:
        """Returns the run whose checkpoints are edited for another."""
        return next(r for r in self.plan() if (r.variant.name, r.seed) == (run.variant.edited_from, run.seed))

    def _check_edit(self, run: Run) -> None:
        """Raises ConfigError, before hours of training, where an edit needs experts that its source does not have."""
        variant, config = run.variant, self.config_of(self._source_of(run))
        fits = config.moe.has_pool if variant.edit == "select" else config.moe.shares_experts
        # What a checkpoint says of its model is known when it is loaded.
        if not fits and not config.checkpoint.use_checkpoint_args:
            needed = "layers that combine banks" if variant.edit == "select" else "layers that share experts"
            raise ConfigError(
                f"derived.{variant.name}.edit", variant.edit,
                f"needs {needed}; those of {variant.edited_from} share so: {sharing_text(config)}",
            )  # fmt: skip

    def _edit(self, run: Run) -> None:
        variant, source = run.variant, self._source_of(run)
        assert variant.edit is not None
        if not self.is_finished(source):
            raise MegatronSamoeError(f"{variant.edited_from} is not finished, so there is nothing to edit.")
        if not store.whole_iterations(run.checkpoints):
            self._command(run, ["-m", "megatron_samoe.cli.edit", variant.edit, "--load-dir",
                                str(source.checkpoints), "--save-dir", str(run.checkpoints)])  # fmt: skip
        flags = [*self.flags_of(source), "--run-dir", str(run.directory), "--use-checkpoint-args", "--no-load-optim"]
        self._command(run, ["-m", "megatron_samoe.cli.pretrain", *flags, "--skip-train"])

    def _command(self, run: Run, arguments: Sequence[str]) -> None:
        log = run.directory / "log.txt"
        with log.open("a") as output:
            output.write(f"$ python {shlex.join(arguments)}\n")
            output.flush()
            status = _run([sys.executable, *arguments], output)
        if status != 0:
            tail = "\n".join(log.read_text().splitlines()[-5:])
            raise MegatronSamoeError(f"A run ended with status {status}; the end of {log}:\n{tail}")

    def _refuse_another(self, run: Run, config: PretrainConfig) -> None:
        iterations = store.whole_iterations(run.checkpoints)
        if not iterations:
            return
        directory = store.iteration_dir(run.checkpoints, iterations[-1])
        found = asdict(from_mapping(store.read_config(directory), str(directory)))
        wanted = asdict(config)
        differing = [
            f"--{name.replace('_', '-')} {found[group][name]} (now {wanted[group][name]})"
            for group in DECISIVE_GROUPS
            for name in wanted[group]
            if name not in INDECISIVE_FIELDS and found[group][name] != wanted[group][name]
        ]
        if differing:
            raise CheckpointError(
                f"{run.directory} holds a run with other options: {', '.join(differing)}. "
                "Give another --output-dir, or remove it."
            )


def _run(command: Sequence[str], output: IO[str]) -> int:
    """Returns a program's exit status. A signal to this process ends the program, which saves before it leaves.

    Raises:
        KeyboardInterrupt: such a signal came; the program has left.
    """
    # In a session of its own, or a terminal's Ctrl-C would reach it twice, and the second ends it at once.
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            try:
                process.wait()
            except KeyboardInterrupt:  # again: whoever asks twice does not want to wait
                process.kill()
            raise


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP do what Ctrl-C does: a run that outlives its study would meet its own successor."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def last_validation(run: Run) -> float | None:
    """Returns the validation loss of a run's last record; None if that has none.

    Raises:
        CheckpointError: the run's records are damaged.
    """
    metrics = run.directory / "metrics.jsonl"
    if not metrics.is_file():
        return None
    records = read_records(metrics)
    return records[-1].get("validation_loss") if records else None
