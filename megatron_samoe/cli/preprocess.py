"""The command line of tools/preprocess_data.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_samoe.cli.arguments import Parser, add_tokenizer_arguments, run
from megatron_samoe.datasets.preprocess.options import INPUT_FORMATS, PreprocessOptions
from megatron_samoe.errors import DataError

DESCRIPTION = """Makes indexed datasets from text. Reads JSONL, plain text and Parquet, each plain or .gz, .zst, .xz,
.bz2, from files, folders, globs, URLs or standard input (-). Writes {prefix}_{key}_document.bin and .idx (byte for
byte Megatron's format; _sentence with --split-sentences) and a manifest. The output appears only when complete, and is
the same for any number of workers. A run that was killed goes on with --resume."""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser(DESCRIPTION)
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, help="files, globs, folders, URLs, or - for standard input")
    group.add_argument("--input-format", choices=INPUT_FORMATS, default="auto", help="auto goes by the file's name")
    group.add_argument("--json-keys", nargs="+", default=["text"], help="keys (Parquet: columns); a dataset for each")
    group.add_argument(
        "--document-separator",
        metavar="REGEX",
        help="text files: a line that matches at its start begins a new document (and stays in it); blank-line "
        "stands for empty lines. Without it a file is one document",
    )
    group.add_argument("--split-sentences", action="store_true", help="a sequence per sentence")
    group.add_argument("--keep-newlines", action="store_true", help="keep white space between sentences")
    group.add_argument(
        "--on-bad-input",
        choices=("skip", "fail"),
        default="fail",
        help="what to do with a line that is no document; skip reports the count and the first 20",
    )
    group.add_argument("--max-document-mb", type=int, default=256, help="a longer line or document is bad input")
    group.add_argument(
        "--input-shard",
        default="0/1",
        metavar="I/N",
        help="take the I-th of N parts of the input files: for job arrays; join with merge_datasets.py",
    )
    add_tokenizer_arguments(parser)
    _add_cleaning(parser)
    _add_output(parser)
    return parser


def _add_cleaning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cleaning (all off unless asked for)")
    group.add_argument("--fix-unicode", action="store_true", help="repair mojibake with ftfy")
    group.add_argument("--min-chars", type=int, default=0, help="leave out shorter documents")
    group.add_argument("--max-chars", type=int, default=0, help="leave out longer documents; 0 for no limit")
    group.add_argument("--languages", nargs="+", default=[], help="keep documents in these languages (py3langid codes)")
    group.add_argument(
        "--deduplicate",
        choices=("none", "exact", "minhash"),
        default="none",
        help="leave out documents equal, or nearly equal, to an earlier one",
    )
    group.add_argument("--minhash-threshold", type=float, default=0.8, help="overlap from which minhash drops (about)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path of the output without _{key}_document.bin")
    group.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    group.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    group.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    group.add_argument(
        "--executor",
        choices=("process", "ray", "inline"),
        default="process",
        help="where workers run; ray: a Ray cluster (RAY_ADDRESS, else one on this machine)",
    )
    group.add_argument("--chunk-kb", type=int, default=1024, help="text handed to a worker at once")
    group.add_argument("--log-interval", type=int, default=1000, help="documents between lines in a log file")
    group.add_argument("--quiet", action="store_true", help="no progress")
    group.add_argument(
        "--partitions",
        type=int,
        default=1,
        choices=(1,),
        help="Megatron's flag; not needed here: several workers write one output",
    )
    group.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="Megatron's flag; the output always keeps the order of the input",
    )


def _main(arguments: Sequence[str] | None) -> None:
    values = vars(make_parser().parse_args(arguments))
    for name in ("partitions", "keep_sequential_samples"):
        del values[name]
    values["chunk_bytes"] = values.pop("chunk_kb") << 10
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run(_main, arguments)


if __name__ == "__main__":
    sys.exit(main())
