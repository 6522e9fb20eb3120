"""Writes one HTML report about finished runs: `report.py --output report.html RUN_DIR [RUN_DIR ...]`.

Folders `moe/seed-1`, `moe/seed-2` are one model with two seeds. --study takes models and runs from a study's results.json.
--decode and --zero-shot add what `benchmark.py decode --json` and `evaluate.py --json` measured of the runs' checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.measurements import read_decode, read_study, read_zero_shot
from megatron_samoe.evaluation.report import ReportData, write_group_report
from megatron_samoe.evaluation.report_tables import results_table
from megatron_samoe.evaluation.run_groups import RunGroup, group_runs, read_groups
from megatron_samoe.evaluation.run_summary import format_table, read_run
from megatron_samoe.inference.decode_bytes import step_bytes

BATCHES = (1, 32)


def bytes_per_token(groups: Sequence[RunGroup]) -> dict[str, dict[int, float]]:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--study", type=Path, metavar="FILE", help="results.json of a study, in place of run folders")
    parser.add_argument(
        "--decode", type=Path, nargs="+", default=[], metavar="FILE", help="of benchmark.py decode --json"
    )
    parser.add_argument("--zero-shot", type=Path, nargs="+", default=[], metavar="FILE", help="of evaluate.py --json")
    parser.add_argument(
        "--note", action="append", default=[], help="a paragraph under the first table; may be repeated"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="PNG plots go beside it")
    parser.add_argument("--title")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    options = make_parser().parse_args(args)
    try:
        if bool(options.runs) == bool(options.study):
            raise ConfigError("RUN_DIR", [str(r) for r in options.runs], "give run folders, or --study, and not both")
        if options.output.is_dir():
            raise ConfigError("--output", str(options.output), "is a folder; name a file, such as report.html")
        title, groups = "Pretraining runs", []
        if options.study:
            title, directories = read_study(options.study)
            groups = read_groups(directories)
        else:
            groups = group_runs([read_run(path) for path in options.runs])
        decode = [row for path in options.decode for row in read_decode(path)]
        zero_shot = [row for path in options.zero_shot for row in read_zero_shot(path)]
        for flag, rows in (("--decode", decode), ("--zero-shot", zero_shot)):
            strangers = {str(r.checkpoint) for r in rows if not any(g.contains(r.checkpoint) for g in groups)}
            if strangers:
                raise ConfigError(flag, sorted(strangers), "is of checkpoints that are in none of the runs' folders")
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(format_table(results_table(groups)))
    data = ReportData(decode, zero_shot, bytes_per_token(groups), options.note)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_group_report(options.output, options.title or title, groups, data)
    except OSError as error:
        print(f"error: --output {options.output} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"report: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
