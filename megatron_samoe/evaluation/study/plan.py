"""The runs of a study: their options, once sweeps have found them, their state, and what they wait for."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from megatron_samoe.config.cli import Asked, as_flags, from_mapping, parse
from megatron_samoe.config.elastic import smallest_world
from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import validate
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError, ConfigError, ConfigErrors
from megatron_samoe.evaluation.run_summary import read_records, read_run, sharing_text
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import Run, Study, Variant, plan_runs, sweep_runs
from megatron_samoe.evaluation.study.sweeps import Optimum, extended, optimum
from megatron_samoe.parsing import parse_yaml


@dataclass
class StudyPlan:
    """The runs of a study.

    Attributes:
        root: folder of all runs.
        common_flags: of pretraining, for every run: corpus, tokenizer, whatever the study's file leaves open.
        store: folder of finished runs of this and other studies; see `results_store`.
        failures: what was said of runs that failed, by folder.
    """

    study: Study
    root: Path
    common_flags: tuple[str, ...]
    store: Path | None = None
    failures: dict[Path, str] = field(default_factory=dict)
    _uses: dict[tuple[str, str], bool] = field(default_factory=dict, init=False, repr=False)
    _configs: dict[tuple[Path, tuple[tuple[str, Any], ...]], PretrainConfig] = field(
        default_factory=dict, init=False, repr=False
    )
    _behind: dict[tuple[str, str], float] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Raises ConfigError if a run's configuration is not legal, its folder holds another run, or what is to be
        edited will not fit."""
        for run in self.all_runs():
            if not run.variant.is_trained:
                self._check_edit(run)
                continue
            config = self.config_of(run)
            _refuse_illegal(config, run.variant.name)
            if config.training.eval_iters == 0:
                raise ConfigError("--eval-iters", 0, "a study compares validation losses; it must be positive")
            if self.is_settled(run):
                self._refuse_another(run, config)

    @cached_property
    def _planned(self) -> list[Run]:
        return plan_runs(self.study, self.root)

    def plan(self) -> list[Run]:
        """Returns the runs that are compared, in their order; later seeds of a variant that was given up are not among them."""
        return [run for run in self._planned if not self._is_given_up(run)]

    def given_up(self) -> set[tuple[str, str]]:
        """Returns names and sizes of variants that get no seed but the first."""
        return {(r.variant.edited_from or r.variant.name, r.size) for r in self._planned if self._is_given_up(r)}

    def _is_given_up(self, run: Run) -> bool:
        """Whether the first seed of a run's variant, or of what it is edited from, ended too far behind the baseline's."""
        name, first = run.variant.edited_from or run.variant.name, self.study.seeds[0]
        if run.seed == first or self.study.give_up is None:
            return False
        if (name, run.size) not in self._behind:
            own, base = (self.full(variant, first, run.size) for variant in (name, self.study.baseline))
            if not (self.is_finished(own) and self.is_finished(base)):
                return False
            self._behind[name, run.size] = self._mean_loss([own]) - self._mean_loss([base])
        return self._behind[name, run.size] > self.study.give_up

    def full(self, variant: str, seed: int, size: str) -> Run:
        """Returns the run of a variant that is compared with others."""
        return next(r for r in self._planned if (r.variant.name, r.seed, r.size) == (variant, seed, size))

    def all_runs(self) -> list[Run]:
        """Returns the runs of sweeps, as far as their ranges are known, and then those that are compared."""
        return [*(run for variant, size in self._swept() for run in self._sweep(variant, size)[0]), *self.plan()]

    def _swept(self) -> list[tuple[Variant, str]]:
        return [(v, size) for size in self.study.sizes for v in self.study.variants if self._is_swept(v, size)]

    def _is_swept(self, variant: Variant, size: str) -> bool:
        """Whether a sweep concerns a model: not where the model's own flags fix the option, nor where it has no use for it, as a
        dense one has none for those of experts."""
        sweep, key = self.study.sweep, (variant.name, size)
        if sweep is None or not sweep.concerns(variant):
            return False
        if key not in self._uses:
            runs = sweep_runs(self.study, self.root, variant, size, sweep.values[:2])
            one, other = (next(run for run in runs if run.swept == value) for value in sweep.values[:2])
            keys = [results_store.run_key(self.config_of(run)) for run in (one, other)]
            self._uses[key] = keys[0] != keys[1]
        return self._uses[key]

    def _sweep(self, variant: Variant, size: str) -> tuple[list[Run], Optimum | None]:
        """Returns the runs of a sweep, and its optimum once all of them are finished. A range whose best value is at an edge
        grows beyond it."""
        sweep = self.study.sweep
        assert sweep is not None
        values = list(sweep.values)
        for extensions in range(sweep.extensions + 1):
            runs = sweep_runs(self.study, self.root, variant, size, values)
            if not all(self.is_finished(run) or run.directory in self.failures for run in runs):
                return runs, None
            losses = {value: self._mean_loss([run for run in runs if run.swept == value]) for value in values}
            found = optimum(losses, between=sweep.choose == "vertex")
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
        if run.swept is not None or not self._is_swept(run.variant, run.size):
            return True
        return self._sweep(run.variant, run.size)[1] is not None

    def config_of(self, run: Run) -> PretrainConfig:
        """Returns the configuration of a trained run; of one that waits for a sweep without the option that is swept."""
        swept = self._swept_options(run)
        key = (run.directory, tuple(swept.items()))
        if key not in self._configs:
            shared = self._shared.with_options(self.study.sizes[run.size], f"sizes.{run.size} of the study")
            # A variant's own come last: an option for every run must not make two variants one.
            asked = shared.with_options(swept, "the study's sweep").as_file()
            asked = asked.with_options(run.variant.options, f"run {run.variant.name!r} of the study")
            own = {"seed": run.seed, "run_dir": str(run.directory)}
            self._configs[key] = _with_experts_of(self._file, asked.with_options(own, "the study").settled())
        return self._configs[key]

    @cached_property
    def _file(self) -> Asked:
        """The options that the study's configuration sets."""
        return parse(("--config", str(self.study.config)))

    @cached_property
    def _shared(self) -> Asked:
        """The options that it and the study's command line set for all runs."""
        return self._file.with_flags(self.common_flags, prog="megatron-samoe study")

    def _swept_options(self, run: Run) -> dict[str, Any]:
        """Returns the options that a sweep gives one of its runs, or a run that it is for once it is done."""
        sweep = self.study.sweep
        if sweep is None:
            return {}
        if run.swept is not None:
            length = {} if sweep.train_iters is None else {"train_iters": sweep.train_iters}
            return {sweep.option: parse_yaml(f"{run.swept:.6g}"), **length}
        found = self._sweep(run.variant, run.size)[1] if self._is_swept(run.variant, run.size) else None
        return {} if found is None else {sweep.option: parse_yaml(f"{found.value:.6g}")}

    def flags_of(self, run: Run) -> list[str]:
        """Returns the flags of a run's pretraining: what it has otherwise than the study's configuration."""
        folder, config = {"run_dir": str(run.directory)}, self.config_of(run)
        file = self._file.with_options(folder, "the study").config.with_run_dir()
        pairs = zip(all_options(config), all_options(file), strict=True)
        others = {
            name: value
            for (_, name, value, _, facts), (_, _, of_file, *_) in pairs
            if value != of_file and facts.has_effect(config)
        }
        return ["--config", str(self.study.config), *as_flags({**others, **folder})]

    def key_of(self, run: Run) -> str:
        """Returns the key of a run's result in the store."""
        if run.variant.is_trained:
            return results_store.run_key(self.config_of(run))
        return results_store.run_key(self.config_of(self.source_of(run)), run.variant.edit)

    def is_finished(self, run: Run) -> bool:
        """Returns whether a run's result is in its folder."""
        return results_store.key_of(run.directory) is not None

    def needs_checkpoints(self, run: Run) -> bool:
        """Whether others are made from a run's checkpoints, so that a result from the store does not do."""
        edited = [r for r in self.plan() if not r.variant.is_trained and self.source_of(r) == run]
        return any(not self.is_finished(r) and not self.take(r) for r in edited)

    def take(self, run: Run) -> bool:
        return results_store.take(self.store, self.key_of(run), run.directory)

    def has_ended(self, run: Run) -> bool:
        """Returns whether a run's last checkpoint is there with that checkpoint's validation loss."""
        iterations = store.whole_iterations(run.checkpoints)
        if not iterations or last_validation(run) is None:
            return False
        return not run.variant.is_trained or iterations[-1] >= self.config_of(run).training.train_iters

    def needs(self, run: Run) -> list[Run]:
        """Returns the runs that must have ended before one can be made: what it is edited from, or its sweep's."""
        if not run.variant.is_trained:
            return [self.source_of(run)]
        is_swept = run.swept is None and self._is_swept(run.variant, run.size)
        return self._sweep(run.variant, run.size)[0] if is_swept else []

    def name_of(self, run: Run) -> str:
        """Returns what a run is called among all: its folder below the study's."""
        return run.directory.relative_to(self.root).as_posix()

    def chosen(self, names: Collection[str] | None) -> list[Run]:
        """Returns the runs of some names and those that they need, in the order of all; every run without names."""
        runs = self.all_runs()
        if names is None:
            return runs
        found: set[Path] = set()
        wanted = [run for run in runs if self.name_of(run) in names]
        while wanted:
            run = wanted.pop()
            if run.directory not in found:
                found.add(run.directory)
                wanted += self.needs(run)
        return [run for run in runs if run.directory in found]

    def source_of(self, run: Run) -> Run:
        """Returns the run whose checkpoints are edited for another."""
        assert run.variant.edited_from is not None
        return self.full(run.variant.edited_from, run.seed, run.size)

    def _check_edit(self, run: Run) -> None:
        """Raises ConfigError, before hours of training, where an edit needs experts that its source does not have."""
        variant, config = run.variant, self.config_of(self.source_of(run))
        fits = config.moe.has_pool if variant.edit == "select" else config.moe.shares_experts
        # What a checkpoint says of its model is known when it is loaded.
        if not fits and not config.checkpoint.use_checkpoint_args:
            needed = "layers that combine banks" if variant.edit == "select" else "layers that share experts"
            raise ConfigError(
                f"derived.{variant.name}.edit",
                variant.edit,
                f"needs {needed}; those of {variant.edited_from} share so: {sharing_text(config)}",
            )

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


def _with_experts_of(file: Asked, config: PretrainConfig) -> PretrainConfig:
    """Returns a configuration whose number of experts is the file's where it has no use for one: keys of results hold it."""
    if config.moe.expert_layout != "dense":
        return config
    return replace(config, moe=replace(config.moe, num_experts=file.config.moe.num_experts))


def _refuse_illegal(config: PretrainConfig, name: str) -> None:
    """Raises ConfigError naming the run and all rules that its configuration breaks. More ranks than its layout needs at least
    are the launcher's matter."""
    if config.checkpoint.use_checkpoint_args:
        return  # the checkpoint says what the model is
    ranks = smallest_world(config)
    try:
        validate(config, ranks)
    except ConfigErrors as found:
        first = found.errors[0]
        raise ConfigErrors(
            [ConfigError(f"run {name!r} of the study: {first.field}", first.value, first.allowed), *found.errors[1:]]
        ) from None


def _differing(found: PretrainConfig, wanted: PretrainConfig) -> list[str]:
    before, now = asdict(found), asdict(wanted)
    return [
        f"{flag(name)} {before[group][name]} (now {now[group][name]})"
        for group in results_store.DECISIVE_GROUPS
        for name in now[group]
        if group != "data" and name not in results_store.INDECISIVE_FIELDS and before[group][name] != now[group][name]
    ]


def last_validation(run: Run) -> float | None:
    """Returns the validation loss of a run's last record; None if that has none.

    Raises:
        CheckpointError: the run's records are damaged.
    """
    metrics = run.directory / "metrics.jsonl"
    if not metrics.is_file():
        return None
    found = metrics.stat()
    return _last_validation(metrics, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4096)
def _last_validation(metrics: Path, *version: int) -> float | None:
    """Of a file as it was once: what is ready is asked every few seconds, and of every finished run."""
    records = read_records(metrics)
    return records[-1].get("validation_loss") if records else None
