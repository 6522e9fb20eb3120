#!/usr/bin/env python3
"""Measures speed against limits, plain torch and other programs in the same run.

Each figure is a median over rounds in which all variants run in turn, so that other load on the machine meets them
alike. Only ratios of one run count: a column "a / b" is a's speed over b's. Every subcommand prints a table; --json keeps
the figures and the conditions of the run, --png draws the ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmark_all_to_all
import benchmark_decode
import benchmark_expert_parallel
import benchmark_layer
import benchmark_ops
import benchmark_roofline
import benchmark_train
import torch
from benchmark_common import as_table, conditions, save

from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend

PARTS = (benchmark_layer, benchmark_train, benchmark_roofline, benchmark_expert_parallel, benchmark_all_to_all,
         benchmark_ops, benchmark_decode)  # fmt: skip


def arguments() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in PARTS:
        part.add_parser(commands)
    return parser.parse_args()


def main() -> int:
    """Runs one benchmark and prints its table."""
    options = arguments()
    switch = extension.ENVIRONMENT_VARIABLE
    if os.environ.get(switch) != "off" and not extension.available():  # which says why
        print(f"error: this would time the slower torch ops; {switch}=off says that you mean to.", file=sys.stderr)
        return 2
    backend.keep_freed_memory()
    backend.set_num_threads(getattr(options, "threads", 1))
    torch.manual_seed(1)
    found = conditions(options)
    try:
        rows = options.run(options)
        # The decoding benchmark writes files of its own form.
        if options.command != "decode":
            save(options, rows, found)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{found['threads']} threads, torch {found['torch']}, extension {found['extension']}, {found['cpu']}\n")
    print(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
