"""Joins datasets into one, by streaming."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_samoe.cli.arguments import Parser, run
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.merge import find_datasets, merge


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Joins datasets into one, by streaming.")
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders (all their datasets, by name)")
    parser.add_argument("--output-prefix", required=True, help="path of the result without .bin and .idx")
    return parser


def _main(arguments: Sequence[str] | None) -> None:
    args = make_parser().parse_args(arguments)
    prefixes = find_datasets(args.input)
    merge(prefixes, args.output_prefix)
    result = IndexedDataset(args.output_prefix)
    print(
        f"{len(prefixes)} datasets -> {args.output_prefix}: {result.num_documents:,} documents, "
        f"{result.num_tokens:,} tokens"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run(_main, arguments)


if __name__ == "__main__":
    sys.exit(main())
