#!/usr/bin/env python3
"""Writes one HTML report about finished runs: `report.py --output report.html RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.report import write_report
from megatron_samoe.evaluation.run_summary import format_table, read_run, summary_table


def main() -> int:
    """Runs the program and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="PNG plots go beside it")
    parser.add_argument("--title", default="Pretraining runs")
    options = parser.parse_args()
    try:
        runs = [read_run(path) for path in options.runs]
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(format_table(summary_table(runs)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_report(options.output, options.title, runs)
    print(f"report: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
