"""Joins datasets into one, by streaming."""

from __future__ import annotations

import argparse
import sys

from megatron_samoe.cli.arguments import Parser, Words, adder, program
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.merge import find_datasets, merge


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Joins datasets into one, by streaming.")
    add = adder(parser)
    add("--input", [str], "prefixes, or folders (all their datasets, by name)", required=True)
    add("--output-prefix", str, "path of the result without .bin and .idx", required=True)
    return parser


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    args = make_parser().parse_args(words)
    prefixes = find_datasets(args.input)
    merge(prefixes, args.output_prefix)
    result = IndexedDataset(args.output_prefix)
    print(
        f"{len(prefixes)} datasets -> {args.output_prefix}: {result.num_documents:,} documents, "
        f"{result.num_tokens:,} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
