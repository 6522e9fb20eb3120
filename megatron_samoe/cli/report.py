"""Writes one HTML report about finished runs: `megatron-samoe report --output report.html RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_samoe.cli.program import program
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.evaluation.measurements import directories_of, read_decode, read_study, read_zero_shot
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes one HTML report about finished runs.

    Folders `moe/seed-1`, `moe/seed-2` are one model with two seeds. --study takes models and runs from a study's results.json.
    --decode and --zero-shot add what `benchmark decode --json` and `evaluate --json` measured of the runs' checkpoints.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN_DIR ...]")] = ()
    """folders of runs"""
    study: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """results.json of a study; replaces run folders"""
    decode: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """of megatron-samoe benchmark decode --json"""
    zero_shot: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """of megatron-samoe evaluate --json"""
    note: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a paragraph under the first table"""
    output: Path = Path("report.html")
    """PNG plots go next to it"""
    title: str | None = None

    def run(self) -> None:
        if bool(self.runs) == bool(self.study):
            raise ConfigError("RUN_DIR", [str(r) for r in self.runs], "give run folders, or --study, and not both")
        if self.output.is_dir():
            raise ConfigError("--output", str(self.output), "is a folder; name a file, such as report.html")
        study = read_study(self.study) if self.study else None
        title = study["title"] if study else "Pretraining runs"
        groups = read_groups(directories_of(study)) if study else group_runs([read_run(path) for path in self.runs])
        decode = [row for path in self.decode for row in read_decode(path)]
        zero_shot = [row for path in self.zero_shot for row in read_zero_shot(path)]
        for flag, checkpoints in (
            ("--decode", [row.checkpoint for row in decode]),
            ("--zero-shot", [row.checkpoint for row in zero_shot]),
        ):
            strangers = {str(path) for path in checkpoints if not any(group.contains(path) for group in groups)}
            if strangers:
                raise ConfigError(flag, sorted(strangers), "is of checkpoints that are in none of the runs' folders")
        print(format_table(results_table(groups)))
        data = ReportData(decode, zero_shot, bytes_per_token(groups), self.note, study=study)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_group_report(self.output, self.title or title, groups, data)
        except OSError as error:
            raise DataError(f"--output {self.output} cannot be written: {error.strerror or error}") from None
        print(f"report: {self.output}")


main = program(Report)

if __name__ == "__main__":
    sys.exit(main())
