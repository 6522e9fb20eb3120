"""Makes the runs of a study, several beside each other; started again, it goes on where it was.

Several programs may work on one study (tasks of a Slurm array, say): each takes the next run that no other has taken, by a
lock on its folder, and what is ready follows from the folders alone.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from megatron_samoe.config.cli import from_mapping, parse_pretrain_args
from megatron_samoe.config.derived import flag, without_idle_options
from megatron_samoe.config.option import all_options
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.run_summary import read_records, read_run, sharing_text
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import Gate, Run, Study, Variant, as_flags, plan_runs, sweep_runs
from megatron_samoe.evaluation.study.programs import Programs, pause_file
from megatron_samoe.evaluation.study.sweeps import Optimum, extended, optimum

#: Seconds between two looks at what can be started, and at what other programs have finished.
_LOOK_S, _LOOK_AT_OTHERS_S = 0.2, 2.0


@dataclass
class StudyRunner:
    """Runs a study.

    Attributes:
        root: folder of all runs.
        common_flags: of pretraining, for every run: corpus, tokenizer, whatever the study's file leaves open.
        say: shows a line.
        jobs: runs at once.
        store: folder of finished runs of this and other studies; see `results_store`.
        launcher: words before `-m megatron_samoe pretrain`; this Python if empty.
        idle: runs wait for whatever else the machine has to do.
        look: called every few seconds while runs go on.
    """

    study: Study
    root: Path
    common_flags: tuple[str, ...]
    say: Callable[[str], None] = print
    jobs: int = 1
    store: Path | None = None
    launcher: tuple[str, ...] = ()
    idle: bool = True
    look: Callable[[], None] = lambda: None
    failures: dict[Path, str] = field(default_factory=dict)
    active: dict[Path, Run] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ConfigError if a run's configuration cannot be read, its folder holds another run, or what is to be
        edited will not fit."""
        for run in self.all_runs():
            if not run.variant.is_trained:
                self._check_edit(run)
                continue
            config = self.config_of(run)
            if config.training.eval_iters == 0:
                raise ConfigError("--eval-iters", 0, "a study compares validation losses; it must be positive")
            if run.length is not None:
                self._check_branch(run)
            if self.is_settled(run):
                self._refuse_another(run, config)

    # What there is to do.

    def plan(self) -> list[Run]:
        """Returns the runs that are compared, in their order."""
        return plan_runs(self.study, self.root)

    def all_runs(self) -> list[Run]:
        """Returns the runs of sweeps, as far as their ranges are known, and then those that are compared."""
        return [*(run for variant, size in self._swept() for run in self._sweep(variant, size)[0]), *self.plan()]

    def _swept(self) -> list[tuple[Variant, str]]:
        sweep = self.study.sweep
        if sweep is None:
            return []
        return [(v, size) for size in self.study.sizes for v in self.study.variants if sweep.concerns(v)]

    def _sweep(self, variant: Variant, size: str) -> tuple[list[Run], Optimum | None]:
        """Returns the runs of a sweep, and its optimum once all of them are finished. A range whose best value lies at an edge
        grows beyond it."""
        sweep = self.study.sweep
        assert sweep is not None
        values = list(sweep.values)
        for extensions in range(sweep.extensions + 1):
            runs = sweep_runs(self.study, self.root, variant, size, values)
            if not all(self.is_finished(run) or run.directory in self.failures for run in runs):
                return runs, None
            losses = {value: self._mean_loss([run for run in runs if run.swept == value]) for value in values}
            found = optimum(losses)
            if found.edge is None or extensions == sweep.extensions:
                break
            values = sorted([*values, extended(values, found.edge)])
        return runs, found

    def _mean_loss(self, runs: Sequence[Run]) -> float:
        losses = [last_validation(run) for run in runs]
        return math.nan if None in losses else sum(losses) / len(losses)  # type: ignore[arg-type]

    def optima(self) -> dict[tuple[str, str], Optimum]:
        """Returns the optima that sweeps have found, by variant and size."""
        found = {(variant.name, size): self._sweep(variant, size)[1] for variant, size in self._swept()}
        return {key: value for key, value in found.items() if value is not None}

    def is_settled(self, run: Run) -> bool:
        """Returns whether a run's options are known: whether it waits for no sweep."""
        sweep = self.study.sweep
        if sweep is None or run.swept is not None or not sweep.concerns(run.variant):
            return True
        return self._sweep(run.variant, run.size)[1] is not None

    def flags_of(self, run: Run) -> list[str]:
        """Returns the flags of a run's pretraining; of one that waits for a sweep those without the option that is swept."""
        # A variant's own come last: a flag for every run must not make two variants one.
        flags = [
            "--config",
            str(self.study.config),
            *self.common_flags,
            *self.study.sizes[run.size],
            *run.variant.flags,
        ]
        sweep = self.study.sweep
        if run.swept is not None and sweep is not None:
            flags += [f"--{sweep.option}", f"{run.swept:.6g}"]
            flags += ["--train-iters", str(sweep.train_iters)] if sweep.train_iters is not None else []
        elif sweep is not None and sweep.concerns(run.variant):
            found = self._sweep(run.variant, run.size)[1]
            flags += [f"--{sweep.option}", f"{found.value:.6g}"] if found is not None else []
        flags = [*flags, "--seed", str(run.seed), "--run-dir", str(run.directory)]
        flags += self._flags_to_leave_out(flags, run)
        if run.length is not None:
            decay = self.leaving_point(run)
            flags += ["--train-iters", str(run.length), "--lr-wsd-decay-iters", str(run.length - decay)]
        return flags

    def _flags_to_leave_out(self, flags: Sequence[str], run: Run) -> list[str]:
        """Returns flags that set what all runs share, but a variant that is said to be dense has no use for, back to its default."""
        config = _parsed(tuple(flags), run.variant.name)
        is_dense = "--expert-layout" in run.variant.flags and config.moe.expert_layout == "dense"
        used = without_idle_options(config) if is_dense else config
        return [
            word
            for group, name, value, _, _ in all_options(used)
            if value != getattr(getattr(config, group), name) and flag(name) not in run.variant.flags
            for word in as_flags({name: list(value) if isinstance(value, tuple) else value})
        ]

    def config_of(self, run: Run) -> PretrainConfig:
        """Returns the configuration of a trained run."""
        return _parsed(tuple(self.flags_of(run)), run.variant.name)

    def leaving_point(self, run: Run) -> int:
        """Returns the step at which a branch leaves the full run: where its decay begins, as long in proportion."""
        assert run.length is not None
        full = self.config_of(self._trunk_of(run))
        decay = full.optimizer.lr_wsd_decay_iters or max(full.training.train_iters // 10, 1)
        return run.length - max(round(run.length * decay / full.training.train_iters), 1)

    def _trunk_of(self, run: Run) -> Run:
        return next(
            r for r in self.plan() if (r.variant, r.seed, r.size, r.length) == (run.variant, run.seed, run.size, None)
        )

    def _check_branch(self, run: Run) -> None:
        full = self.config_of(self._trunk_of(run))
        assert run.length is not None
        if full.optimizer.lr_decay_style != "WSD":
            raise ConfigError("branches", run.length, "need --lr-decay-style WSD: others decay from the start")
        if run.length >= full.training.train_iters:
            raise ConfigError("branches", run.length, f"must be shorter than --train-iters {full.training.train_iters}")

    def key_of(self, run: Run) -> str:
        """Returns the key of a run's result in the store."""
        if run.variant.is_trained:
            return results_store.run_key(self.config_of(run))
        return results_store.run_key(self.config_of(self._source_of(run)), run.variant.edit)

    # What is done.

    def is_finished(self, run: Run) -> bool:
        """Returns whether a run's result is in its folder."""
        return results_store.key_of(run.directory) is not None

    def _is_needed_whole(self, run: Run) -> bool:
        """Whether others are made from a run's checkpoints, so that a result from the store does not do."""
        edited = [r for r in self.plan() if not r.variant.is_trained and self._source_of(r) == run]
        return any(not self.is_finished(r) and not self._take(r) for r in edited) or any(
            not self.is_finished(r) and not self._take(r) for r in self._branches_of(run)
        )

    def _branches_of(self, run: Run) -> list[Run]:
        """Returns the shorter runs that leave the same full run; none for a sweep's."""
        same = (run.variant, run.seed, run.size, run.swept)
        return [r for r in self.plan() if (r.variant, r.seed, r.size, r.swept) == same and r.length is not None]

    def _take(self, run: Run) -> bool:
        return results_store.take(self.store, self.key_of(run), run.directory)

    def _ended(self, run: Run) -> bool:
        """Returns whether a run's last checkpoint is there with that checkpoint's validation loss."""
        iterations = store.whole_iterations(run.checkpoints)
        if not iterations or last_validation(run) is None:
            return False
        return not run.variant.is_trained or iterations[-1] >= self.config_of(run).training.train_iters

    # Making it.

    def run_all(self) -> list[str]:
        """Makes every run that is not finished; returns what was said of those that failed, which stop no other.

        Raises:
            MegatronSamoeError: a run was stopped, or a gate failed; the study can be started again.
        """
        self._told: set[Path] = set()
        self.root.mkdir(parents=True, exist_ok=True)
        stopped: list[str] = []
        workers: list[threading.Thread] = []
        looked = 0.0
        try:
            while True:
                self._programs.pause(pause_file(self.root).exists())
                workers = [worker for worker in workers if worker.is_alive()]
                if time.monotonic() - looked > _LOOK_AT_OTHERS_S or not workers:
                    looked = time.monotonic()
                    self.look()
                    self._check_gates()
                if not stopped and len(workers) < self.jobs and not pause_file(self.root).exists():
                    run = self._next()
                    if run is not None:
                        self.active[run.directory] = run
                        worker = threading.Thread(target=self._work, args=(run, stopped))
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
        return list(self.failures.values())

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

    def _next(self) -> Run | None:
        """Returns the next run that can be made now: none that is finished, failed, under way or in want of another."""
        runs = self.all_runs()
        for run in runs:
            if run.directory in self.active or run.directory in self.failures:
                continue
            if self.is_finished(run):
                self._tell(run, "finished before")
                continue
            waits_for = self._needs(run)
            failed = [r for r in waits_for if r.directory in self.failures]
            if failed and not run.variant.is_trained:
                self._fail(run, f"{failed[0].label} is not finished, so there is nothing to edit.")
            elif self.is_settled(run) and all(self.is_finished(r) or r.directory in self.failures for r in waits_for):
                if not self._is_needed_whole(run) and self._take(run):
                    self._tell(run, "found in the store")
                    continue
                return run
        return None

    def _needs(self, run: Run) -> list[Run]:
        """Returns the runs that must have ended before one can be made: what it is edited from, and shorter branches of the same
        trunk, which is trained as far as the next of them needs it."""
        if not run.variant.is_trained:
            return [self._source_of(run)]
        return [r for r in self._branches_of(run) if run.length is None or (r.length or 0) < run.length]

    def _is_all_done(self) -> bool:
        """Whether nothing is left, here or elsewhere."""
        self._check_gates()
        left = [r for r in self.all_runs() if not self.is_finished(r) and r.directory not in self.failures]
        return not left

    def _work(self, run: Run, stopped: list[str]) -> None:
        started = time.monotonic()
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
            try:
                lock = folder_lock(run.directory)
                lock.__enter__()
            except CheckpointError:
                time.sleep(_LOOK_AT_OTHERS_S)  # another program of this study has it
                return
            try:
                if not self.is_finished(run):
                    self._make(run)
                    self._finish(run, stopped, started)
            finally:
                lock.__exit__(None, None, None)
        except (MegatronSamoeError, OSError) as error:
            self._fail(run, str(error))
        except SystemExit as error:  # a flag that pretraining does not know has been told on standard error
            self._fail(run, f"its flags were refused ({error})")
        finally:
            self.active.pop(run.directory, None)

    def _finish(self, run: Run, stopped: list[str], started: float) -> None:
        if not self._ended(run):
            stopped.append(
                f"{run.label} was stopped before its end; the same command goes on from its last checkpoint. "
                f"Its output is in {run.directory / 'log.txt'}."
            )
            return
        config = self.config_of(run if run.variant.is_trained else self._source_of(run))
        results_store.write_run_file(run.directory, self.key_of(run), config)
        if self.store is not None:
            results_store.put(self.store, run.directory)
        self._tell(run, f"validation loss {last_validation(run):.4f} ({time.monotonic() - started:.0f} s)")

    def _tell(self, run: Run, what: str) -> None:
        if run.directory not in self._told:
            self._told.add(run.directory)
            self.say(f"{run.label}: {what}")

    def _fail(self, run: Run, why: str) -> None:
        self.failures[run.directory] = f"{run.label}: {why}"
        self.say(f"{run.label}: failed")

    def _make(self, run: Run) -> None:
        if not run.variant.is_trained:
            self._edit(run)
            return
        flags = self.flags_of(run)
        if run.length is not None and not store.whole_iterations(run.checkpoints):
            trunk, leaves = self._trunk_of(run), self.leaving_point(run)
            reached = self._train_trunk(trunk, leaves)
            if reached < leaves:
                return  # it was stopped
            # A trunk that is further has left this checkpoint behind: the branch is trained from the start, to the same result.
            flags += ["--load", str(trunk.checkpoints)] if reached == leaves else []
        self._pretrain(run, flags)

    def _train_trunk(self, trunk: Run, leaves: int) -> int:
        """Trains a run as far as the step where a branch leaves it, and returns the step of its last checkpoint."""
        trunk.directory.mkdir(parents=True, exist_ok=True)
        with folder_lock(trunk.directory):
            if last_step(trunk) < leaves:
                self._pretrain(trunk, [*self.flags_of(trunk), "--exit-interval", str(leaves)])
        return last_step(trunk)

    def _pretrain(self, run: Run, flags: Sequence[str]) -> None:
        self._command(run, [*(self.launcher or (sys.executable,)), "-m", "megatron_samoe.cli.pretrain", *flags])

    def _source_of(self, run: Run) -> Run:
        """Returns the run whose checkpoints are edited for another."""
        wanted = (run.variant.edited_from, run.seed, run.size, None)
        return next(r for r in self.plan() if (r.variant.name, r.seed, r.size, r.length) == wanted)

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
        python = [sys.executable, "-m"]
        if not store.whole_iterations(run.checkpoints):
            self._command(run, [*python, "megatron_samoe.cli.edit", variant.edit, "--load-dir",
                                str(source.checkpoints), "--save-dir", str(run.checkpoints)])  # fmt: skip
        flags = [*self.flags_of(source), "--run-dir", str(run.directory), "--use-checkpoint-args", "--no-load-optim"]
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

    # What must hold.

    def _check_gates(self) -> None:
        """Raises MegatronSamoeError where a gate's runs are finished and do not pass."""
        if self.study.gates:
            problems = [text for gate in self.study.gates for text in self.problems_of(gate)]
            if problems:
                raise MegatronSamoeError(f"The study stops at a gate: {'; '.join(problems)}.")

    def problems_of(self, gate: Gate) -> list[str]:
        """Returns what a gate finds wrong in the runs of full length that are finished with both of its variants."""
        pairs = self._pairs(gate)
        if not pairs:
            return []
        problems = []
        if gate.at_most is not None:
            mean = sum((last_validation(a) or 0.0) - (last_validation(b) or 0.0) for a, b in pairs) / len(pairs)
            if not mean <= gate.at_most:
                problems.append(
                    f"{gate.arm} - {gate.baseline} is {mean:+.4f} nats over {len(pairs)} seeds, at most {gate.at_most:+g} is allowed"
                )
        for run, _ in pairs if gate.load_entropy is not None else []:
            found = _load_entropy(run, gate.by_step)
            if found is not None and found < gate.load_entropy:  # type: ignore[operator]
                when = "at the end" if gate.by_step is None else f"by step {gate.by_step}"
                problems.append(
                    f"{run.label} has a least load entropy of {found:.2f} {when}, not {gate.load_entropy:g}"
                )
        return problems

    def _pairs(self, gate: Gate) -> list[tuple[Run, Run]]:
        first = next(iter(self.study.sizes))
        done = {
            (r.variant.name, r.seed): r
            for r in self.plan()
            if r.size == first and r.length is None and self.is_finished(r)
        }
        seeds = [s for s in self.study.seeds if (gate.arm, s) in done and (gate.baseline, s) in done]
        return [(done[gate.arm, s], done[gate.baseline, s]) for s in seeds]

    def _refuse_another(self, run: Run, config: PretrainConfig) -> None:
        if self.is_finished(run):
            found = read_run(run.directory).config
        else:
            iterations = store.whole_iterations(run.checkpoints)
            if not iterations:
                return
            directory = store.iteration_dir(run.checkpoints, iterations[-1])
            found = from_mapping(store.read_config(directory), str(directory))
        differing = _differing(found, config)
        if differing:
            raise CheckpointError(
                f"{run.directory} holds a run with other options: {', '.join(differing)}. "
                "Give another --output-dir, or remove it."
            )


@lru_cache(maxsize=4096)
def _parsed(flags: tuple[str, ...], name: str) -> PretrainConfig:
    return parse_pretrain_args(flags, prog=f"run {name!r} of the study")


def _differing(found: PretrainConfig, wanted: PretrainConfig) -> list[str]:
    before, now = asdict(found), asdict(wanted)
    return [
        f"{flag(name)} {before[group][name]} (now {now[group][name]})"
        for group in results_store.DECISIVE_GROUPS
        for name in now[group]
        if group != "data" and name not in results_store.INDECISIVE_FIELDS and before[group][name] != now[group][name]
    ]


def _load_entropy(run: Run, step: int | None) -> float | None:
    """Returns the least load entropy of any layer in the last record up to a step."""
    records = [r for r in read_records(run.directory / "metrics.jsonl") if "least_load_entropy" in r]
    known = [r for r in records if step is None or r["iteration"] <= step]
    return known[-1]["least_load_entropy"] if known else None


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


def last_step(run: Run) -> int:
    """Returns the step of a run's last whole checkpoint, 0 without any."""
    iterations = store.whole_iterations(run.checkpoints)
    return iterations[-1] if iterations else 0


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
