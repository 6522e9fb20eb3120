"""The command line of `megatron-samoe preprocess`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from megatron_samoe.cli.program import program
from megatron_samoe.config.data import TokenizerType
from megatron_samoe.datasets.preprocess.options import DEFAULT_CHUNK_BYTES, PreprocessOptions
from megatron_samoe.errors import DataError


def _bytes_in(name: str, bits: int) -> Any:
    """Returns how a number of bytes is given in another unit, and by which flag."""
    rule = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=lambda words: int(words[0]) << bits,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value >> bits)],
    )
    return Annotated[int, rule, tyro.conf.arg(name=name)]


@dataclass(frozen=True, kw_only=True)
class Preprocess(PreprocessOptions):
    """Makes indexed datasets from text.

    Reads JSONL, plain text and Parquet, each plain or .gz, .zst, .xz, .bz2, from files, folders, globs, URLs or standard
    input (-). Writes {prefix}_{key}_document.bin and .idx (byte for byte Megatron's format; _sentence with --split-sentences)
    and a manifest. The output appears only when complete, and is the same for any number of workers. A run that was killed
    resumes with --resume. Nothing is cleaned unless asked for.
    """

    document_bytes: _bytes_in("document-kb", 10) = 0  # type: ignore[valid-type]
    """text files: a document ends at the first blank line after this many KB, at twice that anywhere"""
    max_document_bytes: _bytes_in("max-document-mb", 20) = 256 << 20  # type: ignore[valid-type]
    """MB; a longer line or document is bad input"""
    chunk_bytes: _bytes_in("chunk-kb", 10) = DEFAULT_CHUNK_BYTES  # type: ignore[valid-type]
    """KB of text handed to a worker at once"""
    tokenizer_type: TokenizerType = field()
    """kind of tokenizer"""
    workers: int = os.cpu_count() or 1
    """worker processes"""
    overwrite: bool = False
    """replace an existing dataset"""
    partitions: int = 1
    """Megatron's flag; not needed here: several workers write one output"""
    keep_sequential_samples: bool = False
    """Megatron's flag; the output always keeps the order of the input"""

    def run(self) -> None:
        if self.partitions != 1:
            raise DataError(f"--partitions {self.partitions} must be 1: several workers write one output.")
        if not (self.overwrite or self.resume):
            prefixes = [self.dataset_prefix(key) for key in self.json_keys]
            paths = [f"{prefix}{end}" for prefix in prefixes for end in (".bin", ".idx")]
            existing = [path for path in paths if os.path.exists(path)]
            if existing:
                raise DataError(f"{existing[0]} exists. Give --overwrite to replace it, or another --output-prefix.")
        from megatron_samoe.datasets.preprocess.run import preprocess

        print(preprocess(self).describe())


main = program(Preprocess)

if __name__ == "__main__":
    sys.exit(main())
