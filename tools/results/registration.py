"""A study's registration: which runs were announced before the first of them, and whether those of a store are these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.typed import typed
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study.definition import Run, read_study
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.results_store import decisive_options
from megatron_samoe.evaluation.study.sweeps import extended

#: Of the tokenizer the checksums of the data tell enough.
_TOKENIZER = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer.json")


@dataclass(frozen=True)
class Registration:
    """A YAML block of a registration's page.

    Attributes:
        studies: files, in the order of their runs; the page has their names.
        data: checksum and size of the datasets train, valid and test, as a store names them.
        forced: environment variables of every run.
        tag: of the commit where runs did not record it.
        commit: of the code, which every run's machine.json must name, with no changed files.
        store: folder of its runs beside the page; another one for models that were trained again on later code.
    """

    studies: tuple[Path, ...]
    data: Mapping[str, str]
    forced: Mapping[str, str]
    threads_per_rank: int
    tag: str | None = None
    commit: str | None = None
    store: str = "store"


def read_registrations(page: Path, studies: Path) -> list[Registration]:
    """Returns what the blocks of a page register, in their order.

    Args:
        studies: folder of the studies' files.

    Raises:
        ConfigError: the page registers nothing, or something is missing.
    """
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [_registration(yaml.safe_load(block), page, studies) for block in blocks or [""]]


def _registration(block: Any, page: Path, studies: Path) -> Registration:
    found = typed(Registration, block, str(page))
    files = tuple(studies / f"{name}.yaml" for name in found.studies)
    for file in files:
        if not file.is_file():
            raise ConfigError("studies", file.stem, f"is registered in {page}, and {file} is missing")
    return replace(found, studies=files)


def kept_plan(study: Path, data: Mapping[str, str], store: Path, root: Path) -> StudyPlan:
    """Returns the plan of a study with all its runs that a store has, in a folder.

    Args:
        data: checksums by split.
        root: an empty folder.
    """
    paths = [word for split, content in data.items() for word in (f"--{split}-data-path", content)]
    plan = StudyPlan(read_study(study), root, (*paths, *_TOKENIZER), store)
    while any([not plan.is_finished(run) and plan.take(run) for run in plan.all_runs() if plan.is_settled(run)]):
        pass  # what a sweep has found tells further runs
    return plan


def deviations(
    registrations: Iterable[Registration], plans: Mapping[str, StudyPlan], runs: Mapping[str, RunSummary]
) -> list[str]:
    """Returns where runs of a store that read test data are not as they were registered.

    Args:
        plans: of all registered studies, by name, see `kept_plan`.
        runs: of the store, by key.
    """
    planned = [(name, plan, run) for name, plan in plans.items() for run in plan.all_runs() if run.variant.is_trained]
    settled = {plan.key_of(run): (name, run.label) for name, plan, run in planned if plan.is_settled(run)}
    of_study = {study.stem: registration for registration in registrations for study in registration.studies}
    found: list[str] = []
    for key, run in runs.items():
        if not run.config.data.test_data_path:
            continue  # of the first edition
        if key not in settled:
            found += _unregistered(key, run.config, planned)
        else:
            name, label = settled[key]
            found += [f"{name}: {label} ({key}): {text}" for text in _elsewhere(of_study[name], run)]
    return found


def _unregistered(key: str, config: PretrainConfig, planned: list[tuple[str, StudyPlan, Run]]) -> Iterator[str]:
    """Yields in what a run differs from the registered one that is most like it; nothing where it may be one that waits for a
    sweep of which the store lacks runs."""
    candidates = [(_differences(config, plan.config_of(run)), name, plan, run) for name, plan, run in planned]
    if any(_may_be(config, differing, plan, run) for differing, _, plan, run in candidates):
        return
    differing, name, _, run = min((c for c in candidates if c[2].is_settled(c[3])), key=lambda c: _distance(c[0]))
    options = ", ".join(
        f"--{field.replace('_', '-')} {got} (registered: {want})" for field, (got, want) in differing.items()
    )
    yield f"{key} is not registered; from {name}: {run.label} it differs in {options}"


def _may_be(config: PretrainConfig, differing: Mapping[str, Any], plan: StudyPlan, run: Run) -> bool:
    sweep = plan.study.sweep
    if sweep is None or plan.is_settled(run):
        return False
    values = list(sweep.values)
    tried = {f"{value:.6g}" for value in (*values, extended(values, "low"), extended(values, "high"))}
    field = sweep.option.replace("-", "_")
    return set(differing) <= {field} and (sweep.choose == "vertex" or f"{_flat(config).get(field, 0):.6g}" in tried)


def _distance(differing: Mapping[str, tuple[Any, Any]]) -> tuple[int, float]:
    """Returns the number of options that differ, and by how much those that are numbers do."""
    return len(differing), sum(
        abs(got - want) for got, want in differing.values() if isinstance(got, float) and isinstance(want, float)
    )


def _differences(config: PretrainConfig, registered: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    got, want = _flat(config), _flat(registered)
    return {
        field: (got.get(field), want.get(field))
        for field in got.keys() | want.keys()
        if got.get(field) != want.get(field)
    }


def _flat(config: PretrainConfig) -> dict[str, Any]:
    return {field: value for options in decisive_options(config).values() for field, value in options.items()}


def _elsewhere(registration: Registration, run: RunSummary) -> Iterator[str]:
    """Yields how a run's machine and code differ from the registered ones."""
    code = {"commit": registration.commit, "patch": ""} if registration.commit else {}
    for name, wanted in code.items():
        if (got := run.machine.get(name)) != wanted:
            yield f"machine.json has the {name} {got!r}, registered is {wanted!r}"
    forced = run.machine.get("forced", {})
    for name, value in registration.forced.items():
        if forced.get(name) != value:
            yield f"machine.json says {name}={forced.get(name)}, registered is {value}"
    if run.machine.get("threads_per_rank") != registration.threads_per_rank:
        yield f"machine.json says {run.machine.get('threads_per_rank')} threads, registered are {registration.threads_per_rank}"
