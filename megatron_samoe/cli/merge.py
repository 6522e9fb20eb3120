"""Joins datasets into one, by streaming."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_samoe.cli.program import program
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.merge import find_datasets, merge


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Joins datasets into one, by streaming."""

    input: tuple[str, ...]
    """prefixes, or folders (all their datasets, by name)"""
    output_prefix: str
    """path of the result without .bin and .idx"""

    def run(self) -> None:
        prefixes = find_datasets(self.input)
        merge(prefixes, self.output_prefix)
        result = IndexedDataset(self.output_prefix)
        found = f"{result.num_documents:,} documents, {result.num_tokens:,} tokens"
        print(f"{len(prefixes)} datasets -> {self.output_prefix}: {found}")


main = program(Merge)

if __name__ == "__main__":
    sys.exit(main())
