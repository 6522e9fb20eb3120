"""Writes one HTML report about finished runs: `megatron-samoe report --output report.html RUN_DIR [RUN_DIR ...]`.

Folders `moe/seed-1`, `moe/seed-2` are one model with two seeds. --study takes models and runs from a study's results.json.
--decode and --zero-shot add what `benchmark decode --json` and `evaluate --json` measured of the runs' checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_samoe.cli.arguments import Words, adder, program, text_parser
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.evaluation.measurements import read_decode, read_study, read_zero_shot
from megatron_samoe.evaluation.report import ReportData, write_group_report
from megatron_samoe.evaluation.report_tables import results_table
from megatron_samoe.evaluation.run_groups import Groups, group_runs, read_groups
from megatron_samoe.evaluation.run_summary import format_table, read_run
from megatron_samoe.inference.decode_bytes import step_bytes

BATCHES = (1, 32)


def bytes_per_token(groups: Groups) -> dict[str, dict[int, float]]:
    """Returns bytes of fp32 weights read per decoded token, by model and batch; the key-value cache is left out."""
    found: dict[str, dict[int, float]] = {}
    for group in groups:
        run = group.first
        for batch in BATCHES:
            read = step_bytes(run.config, run.vocab_size, batch, 0.0, "folded", "fp32")
            found.setdefault(group.name, {})[batch] = read.total / batch
    return found


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    add = adder(parser)
    add("runs", Path, nargs="*", metavar="RUN_DIR")
    add("--study", Path, "results.json of a study, in place of run folders", metavar="FILE")
    add("--decode", [Path], "of megatron-samoe benchmark decode --json", default=[], metavar="FILE")
    add("--zero-shot", [Path], "of megatron-samoe evaluate --json", default=[], metavar="FILE")
    add("--note", str, "a paragraph under the first table; may be repeated", action="append", default=[])
    add("--output", Path("report.html"), "PNG plots go beside it")
    add("--title")
    return parser


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    options = make_parser().parse_args(words)
    if bool(options.runs) == bool(options.study):
        raise ConfigError("RUN_DIR", [str(r) for r in options.runs], "give run folders, or --study, and not both")
    if options.output.is_dir():
        raise ConfigError("--output", str(options.output), "is a folder; name a file, such as report.html")
    study = read_study(options.study) if options.study else None
    title, groups = "Pretraining runs", []
    if study is not None:
        title, groups = study.title, read_groups(study.directories)
    else:
        groups = group_runs([read_run(path) for path in options.runs])
    decode = [row for path in options.decode for row in read_decode(path)]
    zero_shot = [row for path in options.zero_shot for row in read_zero_shot(path)]
    for flag, checkpoints in (
        ("--decode", [row.checkpoint for row in decode]), ("--zero-shot", [row.checkpoint for row in zero_shot]),
    ):  # fmt: skip
        strangers = {str(path) for path in checkpoints if not any(group.contains(path) for group in groups)}
        if strangers:
            raise ConfigError(flag, sorted(strangers), "is of checkpoints that are in none of the runs' folders")
    print(format_table(results_table(groups)))
    data = ReportData(
        decode, zero_shot, bytes_per_token(groups), options.note, study=study.content if study is not None else None
    )
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_group_report(options.output, options.title or title, groups, data)
    except OSError as error:
        raise DataError(f"--output {options.output} cannot be written: {error.strerror or error}") from None
    print(f"report: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
