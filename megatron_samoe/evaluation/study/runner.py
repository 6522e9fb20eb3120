"""Makes the runs of a study, some at a time; started again, it resumes.

A run is a few command lines, one after another, under the lock of its folder, and what is ready follows from the folders
only. So several programs may work on one study (tasks of a Slurm array, say): each takes the next free run.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_samoe import children
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.folder_lock import FolderInUseError, folder_lock
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import Run
from megatron_samoe.evaluation.study.gates import problems_of
from megatron_samoe.evaluation.study.plan import StudyPlan, last_validation

#: Seconds between two looks at this program's runs, and at those of others.
_LOOK_S, _LOOK_AT_OTHERS_S = 0.2, 2.0
_PRETRAIN = "megatron_samoe.cli.pretrain"
#: Statuses of a run that has ended, or that was stopped and has saved.
_IN_ORDER = (0, 130, -signal.SIGTERM, -signal.SIGKILL)


@dataclass
class Making:
    """A run that is made: command lines that are still to come, and the program that runs now."""

    run: Run
    commands: Iterator[Sequence[str]]
    process: subprocess.Popen | None = None


@dataclass
class StudyRunner:
    """Makes the runs of a plan.

    Attributes:
        names: of the runs that are made, with all that they need; None for every run.
        say: shows a line.
        jobs: runs at once.
        launcher: words before `-m megatron_samoe pretrain`; this Python if empty.
        idle: runs wait for whatever else the machine has to do.
        active: current runs, by folder.
        stopped: what was said of runs that were stopped before their end.
    """

    plan: StudyPlan
    names: Collection[str] | None = None
    say: Callable[[str], None] = print
    jobs: int = 1
    launcher: tuple[str, ...] = ()
    idle: bool = True
    active: dict[Path, Making] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    _reported: set[Path] = field(default_factory=set)

    def run_all(self) -> list[str]:
        """Makes every run that is not finished; returns what was said of those that failed, which stop no other.

        Raises:
            MegatronSamoeError: a run was stopped, or a gate failed; the study can be started again.
        """
        self.plan.root.mkdir(parents=True, exist_ok=True)
        looked = -math.inf
        with self._signals(), self._ending():
            while True:
                ended = [m for m in self.active.values() if m.process is not None and m.process.poll() is not None]
                for making in ended:
                    self._advance(making)
                if ended or time.monotonic() - looked > _LOOK_AT_OTHERS_S:
                    looked = time.monotonic()
                    self._check_gates()
                    while not self.stopped and len(self.active) < self.jobs and self._start_next():
                        pass
                    if not self.active and (self.stopped or not self._left()):
                        break
                time.sleep(_LOOK_S)
        if self.stopped:
            raise MegatronSamoeError(self.stopped[0])
        return list(self.plan.failures.values())

    def _left(self) -> list[Run]:
        """Returns the runs that are not made yet, here or elsewhere."""
        return [run for run in self.plan.chosen(self.names) if not self._is_over(run)]

    def _is_over(self, run: Run) -> bool:
        return run.directory in self.plan.failures or self.plan.is_finished(run)

    def _check_gates(self) -> None:
        """Raises MegatronSamoeError where a gate's runs are finished and do not pass."""
        problems = [text for gate in self.plan.study.gates for text in problems_of(self.plan, gate)]
        if problems:
            raise MegatronSamoeError(f"The study stops at a gate: {'; '.join(problems)}.")

    def _start_next(self) -> bool:
        """Starts the next run that can be made now, and returns whether there is one: none that is finished, failed, under
        way, here or in another program, or in want of another.
        """
        for run in self.plan.chosen(self.names):
            if run.directory in self.active or run.directory in self.plan.failures:
                continue
            if self.plan.is_finished(run):
                self._report(run, "finished before")
                continue
            needs = self.plan.needs(run)
            failed = [r for r in needs if r.directory in self.plan.failures]
            if failed and not run.variant.is_trained:
                self._fail(run, f"{failed[0].label} is not finished, so there is nothing to edit.")
            elif all(map(self._is_over, needs)):
                if not self.plan.needs_checkpoints(run) and self.plan.take(run):
                    self._report(run, "found in the store")
                elif self._advance(Making(run, self._commands(run))):
                    return True
        return False

    def _advance(self, making: Making) -> bool:
        """Starts the next command of a run, and returns whether there is one: not where the run has ended, has failed, or is
        another program's."""
        run = making.run
        try:
            if making.process is not None and making.process.returncode not in _IN_ORDER:
                log = run.directory / "log.txt"
                tail = "\n".join(log.read_text().splitlines()[-5:])
                raise MegatronSamoeError(
                    f"A run ended with status {making.process.returncode}; the end of {log}:\n{tail}"
                )
            command = next(making.commands, None)
            if command is not None:
                making.process = self._started(run, command)
                self.active[run.directory] = making
                return True
        except FolderInUseError:
            pass
        except (MegatronSamoeError, OSError) as error:
            self._fail(run, str(error))
        except SystemExit as error:  # an unknown flag has been reported on standard error
            self._fail(run, f"its flags were refused ({error})")
        self._close(making)
        return False

    def _close(self, making: Making) -> None:
        """Gives up the locks of a run that is made no further."""
        making.commands.close()  # type: ignore[attr-defined]
        self.active.pop(making.run.directory, None)

    def _started(self, run: Run, command: Sequence[str]) -> subprocess.Popen:
        with (run.directory / "log.txt").open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            # In a session of its own, or a terminal's Ctrl-C would reach it twice, and the second ends it at once.
            return children.start(
                command, idle=self.idle, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _commands(self, run: Run) -> Iterator[Sequence[str]]:
        """Yields the command lines that make a run, under its lock; each is asked for when the one before has ended.

        Raises:
            FolderInUseError: another program makes it.
        """
        run.directory.mkdir(parents=True, exist_ok=True)
        with folder_lock(run.directory):
            if not self.plan.is_finished(run):
                started = time.monotonic()
                if run.variant.is_trained:
                    yield [*(self.launcher or (sys.executable,)), "-m", _PRETRAIN, *self.plan.flags_of(run)]
                else:
                    yield from self._editing(run)
                self._finish(run, started)

    def _editing(self, run: Run) -> Iterator[Sequence[str]]:
        source, edit = self.plan.source_of(run), run.variant.edit
        assert edit is not None
        if not store.whole_iterations(run.checkpoints):
            folders = ["--load-dir", str(source.checkpoints), "--save-dir", str(run.checkpoints)]
            yield [sys.executable, "-m", "megatron_samoe.cli.edit", edit, *folders]
        own = ["--run-dir", str(run.directory), "--use-checkpoint-args", "--no-load-optim", "--skip-train"]
        yield [sys.executable, "-m", _PRETRAIN, *self.plan.flags_of(source), *own]

    def _finish(self, run: Run, started: float) -> None:
        if not self.plan.has_ended(run):
            self.stopped.append(
                f"{run.label} was stopped before its end; the same command resumes it. "
                f"{store.newest_in_words(run.checkpoints)} "
                f"Its output is in {run.directory / 'log.txt'}."
            )
            return
        config = self.plan.config_of(run if run.variant.is_trained else self.plan.source_of(run))
        results_store.write_run_file(run.directory, self.plan.key_of(run), config)
        if self.plan.store is not None:
            results_store.put(self.plan.store, run.directory)
        self._report(run, f"validation loss {last_validation(run):.4f} ({time.monotonic() - started:.0f} s)")

    def _report(self, run: Run, what: str) -> None:
        if run.directory not in self._reported:
            self._reported.add(run.directory)
            self.say(f"{run.label}: {what}")

    def _fail(self, run: Run, why: str) -> None:
        self.plan.failures[run.directory] = f"{run.label}: {why}"
        self.say(f"{run.label}: failed")

    def _signal(self, number: signal.Signals) -> None:
        """Sends a signal to all programs, each with whatever its launcher has started."""
        for making in self.active.values():
            with contextlib.suppress(ProcessLookupError):
                if making.process is not None:
                    os.killpg(making.process.pid, number)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Ends the programs with the study: with leave to save, unless somebody who interrupts again does not want to wait."""
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                self._signal(number)
                self._signal(signal.SIGCONT)
                with contextlib.suppress(KeyboardInterrupt):
                    for making in list(self.active.values()):
                        if making.process is not None:
                            making.process.wait()
                        self._close(making)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes SIGTERM and SIGHUP do what Ctrl-C does: a run that outlives its study would collide with its own successor. SIGTSTP, as
        Ctrl-Z sends it, holds the runs with the study until it is continued."""

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        def hold(number: int, frame: object) -> None:
            self._signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signal(signal.SIGCONT)

        handlers = {signal.SIGTERM: interrupt, signal.SIGHUP: interrupt, signal.SIGTSTP: hold}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
