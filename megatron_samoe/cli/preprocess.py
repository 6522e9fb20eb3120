"""The command line of `megatron-samoe preprocess`."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_samoe.cli.arguments import Parser, Words, add_tokenizer_arguments, adder, program
from megatron_samoe.datasets.preprocess.options import INPUT_FORMATS, PreprocessOptions
from megatron_samoe.errors import DataError

DESCRIPTION = """Makes indexed datasets from text. Reads JSONL, plain text and Parquet, each plain or .gz, .zst, .xz,
.bz2, from files, folders, globs, URLs or standard input (-). Writes {prefix}_{key}_document.bin and .idx (byte for
byte Megatron's format; _sentence with --split-sentences) and a manifest. The output appears only when complete, and is
the same for any number of workers. A run that was killed goes on with --resume."""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser(DESCRIPTION)
    add = adder(parser.add_argument_group("input"))
    add("--input", [str], "files, globs, folders, URLs, or - for standard input", required=True)
    add("--input-format", INPUT_FORMATS, "auto goes by the file's name")
    add("--json-keys", ["text"], "keys (Parquet: columns); a dataset for each")
    add(
        "--document-separator",
        str,
        "text files: a line that matches at its start begins a new document (and stays in it); blank-line "
        "stands for empty lines. Without it and --document-kb a file is one document",
        metavar="REGEX",
    )
    add(
        "--document-kb",
        0,
        "text files: a document ends at the first blank line after so many KB, at twice as many anywhere",
    )
    add("--split-sentences", bool, "a sequence per sentence")
    add("--keep-newlines", bool, "keep white space between sentences")
    add(
        "--on-bad-input",
        ("skip", "fail"),
        "what to do with a line that is no document; skip reports the count and the first 20",
        default="fail",
    )
    add("--max-document-mb", 256, "a longer line or document is bad input")
    add(
        "--input-shard",
        "0/1",
        "take the I-th of N parts of the input files: for job arrays; join with megatron-samoe merge",
        metavar="I/N",
    )
    add_tokenizer_arguments(parser)
    add = adder(parser.add_argument_group("cleaning (all off unless asked for)"))
    add("--fix-unicode", bool, "repair mojibake with ftfy")
    add("--min-chars", 0, "leave out shorter documents")
    add("--max-chars", 0, "leave out longer documents; 0 for no limit")
    add("--languages", [], "keep documents in these languages (py3langid codes)")
    add("--deduplicate", ("none", "exact", "minhash"), "leave out documents equal, or nearly equal, to an earlier one")
    add("--minhash-threshold", 0.8, "overlap from which minhash drops (about)")
    add = adder(parser.add_argument_group("output"))
    add("--output-prefix", str, "path of the output without _{key}_document.bin", required=True)
    add("--append-eod", bool, "end each document with the end-of-document token")
    add("--resume", bool, "go on with a run that was stopped")
    add("--overwrite", bool, "replace an existing dataset")
    add = adder(parser.add_argument_group("running"))
    add("--workers", os.cpu_count() or 1, "worker processes")
    add(
        "--executor",
        ("process", "ray", "inline"),
        "where workers run; ray: a Ray cluster (RAY_ADDRESS, else one on this machine)",
    )
    add("--chunk-kb", 1024, "text handed to a worker at once")
    add("--log-interval", 1000, "documents between lines in a log file")
    add("--quiet", bool, "no progress")
    add("--partitions", (1,), "Megatron's flag; not needed here: several workers write one output")
    add("--keep-sequential-samples", bool, "Megatron's flag; the output always keeps the order of the input")
    return parser


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    values = vars(make_parser().parse_args(words))
    for name in ("partitions", "keep_sequential_samples"):
        del values[name]
    values["chunk_bytes"] = values.pop("chunk_kb") << 10
    values["document_bytes"] = values.pop("document_kb") << 10
    values["max_document_bytes"] = values.pop("max_document_mb") << 20
    for name in ("input", "json_keys", "languages"):
        values[name] = tuple(values[name])
    overwrite = values.pop("overwrite")
    options = PreprocessOptions(**values)
    if not (overwrite or options.resume):
        _refuse_existing(options)
    from megatron_samoe.datasets.preprocess.run import preprocess

    print(preprocess(options).describe())


def _refuse_existing(options: PreprocessOptions) -> None:
    """Raises DataError where a dataset would be replaced."""
    prefixes = [options.dataset_prefix(key) for key in options.json_keys]
    existing = [f"{prefix}{end}" for prefix in prefixes for end in (".bin", ".idx") if os.path.exists(f"{prefix}{end}")]
    if existing:
        raise DataError(f"{existing[0]} exists. Give --overwrite to replace it, or another --output-prefix.")


if __name__ == "__main__":
    sys.exit(main())
