"""The study tool's command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_samoe.cli.arguments import Words, adder, program
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.evaluation.study.definition import read_study
from megatron_samoe.evaluation.study.results import collect, results_table, write_results
from megatron_samoe.evaluation.study.runner import StudyRunner, signals_interrupt


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(
        description="Trains the models of a study, several seeds each, and compares them.",
        epilog="All other flags go to the pretraining of every run (the corpus and the tokenizer, say). Runs go one at a "
        "time; started again with the same command, the study goes on where it was stopped.",
        allow_abbrev=False,
    )
    add = adder(parser)
    add("study", Path, "YAML file: see examples/studies")
    add("--output-dir", Path, "folder of all runs and of results.json", required=True)
    add("--seeds", [int], "these in place of the file's", metavar="N")
    add("--dry-run", bool, "check everything, show the runs, and start none")
    add("--collect-only", bool, "start no run; compare those that are finished")
    return parser


@program
def main(words: Words) -> int:
    """Runs the command and returns its exit status."""
    options, pretrain_flags = make_parser().parse_known_args(words)
    study = read_study(options.study, options.seeds)
    runner = StudyRunner(study, options.output_dir, tuple(pretrain_flags), say=lambda line: print(line, flush=True))
    try:
        runner.check()
        if options.dry_run:
            _show_plan(runner)
            return 0
        failures = []
        if not options.collect_only:
            with signals_interrupt():
                failures = runner.run_all()
        _finish(runner, failures)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _finish(runner: StudyRunner, failures: Sequence[str]) -> None:
    """Compares what is finished, then raises MegatronSamoeError for what failed."""
    failed = "\n".join(["Some runs failed; the same command tries them again.", *failures])
    try:
        _compare(runner)
    except MegatronSamoeError as error:
        if not failures:
            raise
        failed += f"\n{error}"
    if failures:
        raise MegatronSamoeError(failed)


def _show_plan(runner: StudyRunner) -> None:
    for run in runner.plan():
        state = "finished" if runner.is_finished(run) else "to do"
        what = shlex.join(run.variant.flags) if run.variant.is_trained else (
            f"{run.variant.edit} of {run.variant.edited_from}"
        )  # fmt: skip
        print(f"{state:8}  seed {run.seed}  {run.variant.name}  {what}")


def _compare(runner: StudyRunner) -> None:
    finished = [run for run in runner.plan() if runner.is_finished(run)]
    results = collect(runner.study, finished)
    if not results:
        raise MegatronSamoeError("No seed is finished for every model of the study, so there is nothing to compare.")
    seeds = len(results[0].losses)
    commands = [
        f"python -m megatron_samoe.cli.pretrain {shlex.join(runner.flags_of(run))}"
        for run in finished
        if run.variant.is_trained
    ]
    print(f"\n{runner.study.title}: {seeds} of {len(runner.study.seeds)} seeds\n")
    print(format_table(results_table(runner.study, results)))
    print("\nsd: over seeds. Differences are within seeds, with the 95 % interval by Student's t.")
    path = runner.root / "results.json"
    write_results(path, runner.study, seeds, results, commands)
    print(f"results: {path}")


if __name__ == "__main__":
    sys.exit(main())
