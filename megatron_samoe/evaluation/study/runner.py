"""Makes the runs of a study, several beside each other; started again, it goes on where it was.

Several programs may work on one study (tasks of a Slurm array, say): each takes the next run that no other has taken, by a
lock on its folder, and what is ready follows from the folders alone.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.errors import CheckpointError, MegatronSamoeError
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import Run
from megatron_samoe.evaluation.study.gates import problems_of
from megatron_samoe.evaluation.study.plan import StudyPlan, last_step, last_validation
from megatron_samoe.evaluation.study.programs import Programs, pause_file

#: Seconds between two looks at what can be started, and at what other programs have finished.
_LOOK_S, _LOOK_AT_OTHERS_S = 0.2, 2.0


@dataclass(frozen=True)
class Claim:
    """A run that no other program, and no other worker, makes as long as its locks are held.

    Attributes:
        trunk_lock: of the run that this one leaves, until that has come there; of nothing where it has.
    """

    run: Run
    lock: contextlib.ExitStack
    trunk_lock: contextlib.ExitStack


@dataclass
class StudyRunner:
    """Makes the runs of a plan.

    Attributes:
        say: shows a line.
        jobs: runs at once.
        launcher: words before `-m megatron_samoe pretrain`; this Python if empty.
        idle: runs wait for whatever else the machine has to do.
        look: called every few seconds while runs go on.
        active: runs that go on now, by folder.
    """

    plan: StudyPlan
    say: Callable[[str], None] = print
    jobs: int = 1
    launcher: tuple[str, ...] = ()
    idle: bool = True
    look: Callable[[], None] = lambda: None
    active: dict[Path, Run] = field(default_factory=dict)

    def run_all(self) -> list[str]:
        """Makes every run that is not finished; returns what was said of those that failed, which stop no other.

        Raises:
            MegatronSamoeError: a run was stopped, or a gate failed; the study can be started again.
        """
        self._told: set[Path] = set()
        self.plan.root.mkdir(parents=True, exist_ok=True)
        stopped: list[str] = []
        workers: list[threading.Thread] = []
        looked = 0.0
        try:
            while True:
                self._programs.pause(pause_file(self.plan.root).exists())
                workers = [worker for worker in workers if worker.is_alive()]
                if time.monotonic() - looked > _LOOK_AT_OTHERS_S or not workers:
                    looked = time.monotonic()
                    self.look()
                    self._check_gates()
                if not stopped and len(workers) < self.jobs and not pause_file(self.plan.root).exists():
                    claim = self._next()
                    if claim is not None:
                        self.active[claim.run.directory] = claim.run
                        worker = threading.Thread(target=self._work, args=(claim, stopped))
                        worker.start()
                        workers.append(worker)
                        continue
                if not workers and (stopped or self._is_all_done()):
                    break
                time.sleep(_LOOK_S if workers else _LOOK_AT_OTHERS_S)
        except BaseException:
            self._end(workers)
            raise
        self.look()
        if stopped:
            raise MegatronSamoeError(stopped[0])
        return list(self.plan.failures.values())

    def _check_gates(self) -> None:
        """Raises MegatronSamoeError where a gate's runs are finished and do not pass."""
        problems = [text for gate in self.plan.study.gates for text in problems_of(self.plan, gate)]
        if problems:
            raise MegatronSamoeError(f"The study stops at a gate: {'; '.join(problems)}.")

    def _end(self, workers: Sequence[threading.Thread]) -> None:
        """Ends the programs and waits for them; whoever interrupts again does not want to wait."""
        self._programs.end()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            self._programs.end(at_once=True)
            for worker in workers:
                worker.join()

    @cached_property
    def _programs(self) -> Programs:
        return Programs(self.idle)

    def _next(self) -> Claim | None:
        """Returns the next run that can be made now, claimed: none that is finished, failed, under way, here or in another
        program, or in want of another.
        """
        runs = self.plan.all_runs()
        for run in runs:
            if run.directory in self.active or run.directory in self.plan.failures:
                continue
            if self.plan.is_finished(run):
                self._tell(run, "finished before")
                continue
            waits_for = self.plan.needs(run)
            failed = [r for r in waits_for if r.directory in self.plan.failures]
            if failed and not run.variant.is_trained:
                self._fail(run, f"{failed[0].label} is not finished, so there is nothing to edit.")
            elif self.plan.is_settled(run) and all(
                self.plan.is_finished(r) or r.directory in self.plan.failures for r in waits_for
            ):
                if not self.plan.is_needed_whole(run) and self.plan.take(run):
                    self._tell(run, "found in the store")
                    continue
                claim = self._claim(run)
                if claim is not None:
                    return claim
        return None

    def _claim(self, run: Run) -> Claim | None:
        """Takes the locks of a run and of the trunk that must be trained for it; None where somebody has one of them."""
        with contextlib.ExitStack() as own, contextlib.ExitStack() as trunks:
            try:
                run.directory.mkdir(parents=True, exist_ok=True)
                own.enter_context(folder_lock(run.directory))
                if self._needs_trunk(run):
                    trunk = self.plan.trunk_of(run)
                    trunk.directory.mkdir(parents=True, exist_ok=True)
                    trunks.enter_context(folder_lock(trunk.directory))
            except CheckpointError:
                return None
            except OSError as error:
                self._fail(run, str(error))
                return None
            return Claim(run, own.pop_all(), trunks.pop_all())

    def _needs_trunk(self, run: Run) -> bool:
        """Whether a run's trunk must first come to where the run leaves it."""
        if run.length is None or not run.variant.is_trained or store.whole_iterations(run.checkpoints):
            return False
        return last_step(self.plan.trunk_of(run)) < self.plan.leaving_point(run)

    def _is_all_done(self) -> bool:
        """Whether nothing is left, here or elsewhere."""
        left = [
            r for r in self.plan.all_runs() if not self.plan.is_finished(r) and r.directory not in self.plan.failures
        ]
        return not left

    def _work(self, claim: Claim, stopped: list[str]) -> None:
        run, started = claim.run, time.monotonic()
        try:
            with claim.lock, claim.trunk_lock:
                if not self.plan.is_finished(run):
                    self._make(claim)
                    self._finish(run, stopped, started)
        except (MegatronSamoeError, OSError) as error:
            self._fail(run, str(error))
        except SystemExit as error:  # a flag that pretraining does not know has been told on standard error
            self._fail(run, f"its flags were refused ({error})")
        finally:
            self.active.pop(run.directory, None)

    def _finish(self, run: Run, stopped: list[str], started: float) -> None:
        if not self.plan.has_ended(run):
            stopped.append(
                f"{run.label} was stopped before its end; the same command goes on from its last checkpoint. "
                f"Its output is in {run.directory / 'log.txt'}."
            )
            return
        config = self.plan.config_of(run if run.variant.is_trained else self.plan.source_of(run))
        results_store.write_run_file(run.directory, self.plan.key_of(run), config)
        if self.plan.store is not None:
            results_store.put(self.plan.store, run.directory)
        self._tell(run, f"validation loss {last_validation(run):.4f} ({time.monotonic() - started:.0f} s)")

    def _tell(self, run: Run, what: str) -> None:
        if run.directory not in self._told:
            self._told.add(run.directory)
            self.say(f"{run.label}: {what}")

    def _fail(self, run: Run, why: str) -> None:
        self.plan.failures[run.directory] = f"{run.label}: {why}"
        self.say(f"{run.label}: failed")

    def _make(self, claim: Claim) -> None:
        run = claim.run
        if not run.variant.is_trained:
            self._edit(run)
            return
        flags = self.plan.flags_of(run)
        if run.length is not None and not store.whole_iterations(run.checkpoints):
            trunk, leaves = self.plan.trunk_of(run), self.plan.leaving_point(run)
            if last_step(trunk) < leaves:
                self._pretrain(trunk, [*self.plan.flags_of(trunk), "--exit-interval", str(leaves)])
            claim.trunk_lock.close()
            reached = last_step(trunk)
            if reached < leaves:
                return  # it was stopped
            # A trunk that is further has left this checkpoint behind: the branch is trained from the start, to the same result.
            flags += ["--load", str(trunk.checkpoints)] if reached == leaves else []
        self._pretrain(run, flags)

    def _pretrain(self, run: Run, flags: Sequence[str]) -> None:
        self._command(run, [*(self.launcher or (sys.executable,)), "-m", "megatron_samoe.cli.pretrain", *flags])

    def _edit(self, run: Run) -> None:
        variant, source = run.variant, self.plan.source_of(run)
        assert variant.edit is not None
        python = [sys.executable, "-m"]
        if not store.whole_iterations(run.checkpoints):
            self._command(run, [*python, "megatron_samoe.cli.edit", variant.edit, "--load-dir",
                                str(source.checkpoints), "--save-dir", str(run.checkpoints)])  # fmt: skip
        flags = [
            *self.plan.flags_of(source),
            "--run-dir",
            str(run.directory),
            "--use-checkpoint-args",
            "--no-load-optim",
        ]
        self._command(run, [*python, "megatron_samoe.cli.pretrain", *flags, "--skip-train"])

    def _command(self, run: Run, command: Sequence[str]) -> None:
        log = run.directory / "log.txt"
        with log.open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            status = self._programs.run(command, output)
        if status not in (0, 130, -signal.SIGTERM, -signal.SIGKILL):
            tail = "\n".join(log.read_text().splitlines()[-5:])
            raise MegatronSamoeError(f"A run ended with status {status}; the end of {log}:\n{tail}")


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
