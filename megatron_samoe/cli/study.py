"""The study tool's command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_samoe.cli.program import HandsOn, program
from megatron_samoe.cli.report import main as report_main
from megatron_samoe.config.cli import as_flags
from megatron_samoe.errors import ConfigError, MegatronSamoeError, nearest, nearest_file
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.evaluation.study.definition import plan_runs, read_study
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.results import collect, results_table, unequal_arms, write_results
from megatron_samoe.evaluation.study.runner import StudyRunner
from megatron_samoe.evaluation.study.text_folder import prepare


@dataclass(frozen=True, kw_only=True)
class Study(HandsOn):
    """Trains the models of a study, several seeds each, and compares them.

    All other flags go to the pretraining of every run (the corpus and the tokenizer, say). Started again with the same command,
    the study resumes; started several times at once on one folder, the programs share its runs. Ctrl-Z
    (kill -TSTP) holds its runs, fg (kill -CONT) continues them.
    """

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]
    """YAML file: see examples/studies"""
    output_dir: Path
    """folder of all runs and of results.json"""
    seeds: tuple[int, ...] = ()
    """these replace the file's"""
    text: Path | None = None
    """folder of text files to train on, instead of a corpus and a tokenizer in the other flags; a report is made at the end"""
    vocab_size: int = 4096
    """of the byte-level BPE that is made of --text"""
    jobs: int = 1
    """runs at once"""
    full_priority: bool = False
    """runs take their share of a busy machine; otherwise they wait for idle processors"""
    store: Path | None = None
    """folder of finished runs of all studies, by what decides their result: none is trained twice"""
    launcher: str = ""
    """words that start a run's ranks, such as 'torchrun --nproc-per-node 8'"""
    only: Annotated[tuple[str, ...], tyro.conf.arg(name="run", metavar="NAME [NAME ...]")] = ()
    """only these runs, by the names that --dry-run shows, and those that they need"""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """only a part of the runs, such as 2/6, and those that they need"""
    dry_run: bool = False
    """check everything, show the runs, and start none"""
    collect_only: bool = False
    """start no run; compare those that are finished"""

    def run(self) -> int:
        if self.jobs < 1:
            raise ConfigError("--jobs", self.jobs, "must be at least 1")
        if not self.study.is_file():
            raise ConfigError("study", str(self.study), f"no such file.{nearest_file(str(self.study))}")
        flags = self.others
        study = read_study(self.study, self.seeds or None)
        if self.text is not None:
            data = self.output_dir / "data"
            flags += tuple(prepare(self.text, data, self.vocab_size, lambda line: print(line, flush=True)))
        plan = StudyPlan(study, self.output_dir, flags, self.store)
        try:
            plan.check()
            names = self._names(plan)
            runner = StudyRunner(
                plan,
                names,
                say=lambda line: print(line, flush=True),
                jobs=self.jobs,
                launcher=tuple(shlex.split(self.launcher)),
                idle=not self.full_priority,
            )
            if self.dry_run:
                _show_plan(plan, names)
                return 0
            failures = [] if self.collect_only else runner.run_all()
            left = [run for run in plan.all_runs() if not plan.is_finished(run)]
            if names is not None and left and not failures:
                print(f"{len(left)} runs of other parts are not finished; the program that ends last compares all.")
                return 0
            _finish(plan, failures)
            if self.text is not None:
                report = self.output_dir / "report.html"
                return report_main(["--study", str(self.output_dir / "results.json"), "--output", str(report)])
        except KeyboardInterrupt:
            print("stopped; the same command resumes.", file=sys.stderr)
            return 130
        return 0

    def _names(self, plan: StudyPlan) -> Collection[str] | None:
        """Returns the names of the runs that are asked for; None for all."""
        if self.only and self.shard:
            raise ConfigError("--shard", self.shard, "excludes --run")
        if self.shard:
            part, _, parts = self.shard.partition("/")
            if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
                raise ConfigError("--shard", self.shard, "must be a part and the number of parts, such as 2/6")
            # Of all that a study may come to: what is given up or swept shifts no run to another part.
            return {plan.name_of(run) for run in plan_runs(plan.study, plan.root)[int(part) - 1 :: int(parts)]}
        known = [plan.name_of(run) for run in plan.all_runs()]
        for name in self.only:
            if name not in known:
                raise ConfigError(
                    "--run", name, f"names no run of the study; --dry-run shows them.{nearest(name, known)}"
                )
        return self.only or None


def _finish(plan: StudyPlan, failures: Sequence[str]) -> None:
    """Compares what is finished, then raises MegatronSamoeError for what failed."""
    failed = "\n".join(["Some runs failed; the same command tries them again.", *failures])
    try:
        _compare(plan)
    except MegatronSamoeError as error:
        if not failures:
            raise
        failed += f"\n{error}"
    if failures:
        raise MegatronSamoeError(failed)


def _show_plan(plan: StudyPlan, names: Collection[str] | None) -> None:
    for run in plan.chosen(names):
        state = "finished" if plan.is_finished(run) else "to do" if plan.is_settled(run) else "waits for a sweep"
        edit = f"{run.variant.edit} of {run.variant.edited_from}"
        what = shlex.join(as_flags(run.variant.options)) if run.variant.is_trained else edit
        print(f"{state:8}  {plan.name_of(run)}  {what}")


def _compare(plan: StudyPlan) -> None:
    study = plan.study
    finished = [run for run in plan.plan() if plan.is_finished(run)]
    comparisons = collect(study, finished, plan.given_up())
    if not comparisons:
        raise MegatronSamoeError("No seed is finished for every model of the study, so there is nothing to compare.")
    commands = [
        f"python -m megatron_samoe.cli.pretrain {shlex.join(plan.flags_of(run))}"
        for run in finished
        if run.variant.is_trained
    ]
    for comparison in comparisons:
        title = ", ".join(filter(None, (study.title, comparison.size)))
        print(f"\n{title}: {len(comparison.seeds)} of {len(study.seeds)} seeds\n")
        print(format_table(results_table(study, comparison)))
        for warning in unequal_arms(study, comparison.groups):
            print(f"note: {warning}")
    print(
        "\nvalid. loss: mean ± standard deviation over seeds. Differences are within seeds, with the 95 % interval by Student's t;\n"
        "pooled: with the spread of all trained models. p equal: of such differences if the models were "
        f"{study.margin:g} nats apart; p Holm: if none differed."
    )
    optima = plan.optima()
    for (name, size), found in optima.items():
        assert study.sweep is not None
        beyond = f"; the best tried is at the {found.edge} edge of the range" if found.edge else ""
        print(
            f"{', '.join(filter(None, (name, size)))}: {study.sweep.option} {found.value:.3g}, loss {found.loss:.4f}{beyond}"
        )
    path = plan.root / "results.json"
    write_results(path, study, comparisons, optima, commands)
    print(f"results: {path}")


main = program(Study)

if __name__ == "__main__":
    sys.exit(main())
