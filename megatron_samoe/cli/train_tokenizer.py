"""Trains a tokenizer on text."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from megatron_samoe.cli.arguments import Parser, run
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.train_tokenizer import TYPES, corpus_texts, train_byte_bpe, train_sentencepiece
from megatron_samoe.errors import DataError


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Trains a tokenizer on text.")
    parser.add_argument("--type", required=True, choices=TYPES, help="kind of tokenizer")
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or folders, as for preprocess_data.py")
    parser.add_argument("--input-format", choices=inputs_formats(), default="auto", help="auto goes by the file's name")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys (Parquet: columns) to train on")
    parser.add_argument(
        "--on-bad-input", choices=("skip", "fail"), default="fail", help="for lines that are no document"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="entries of the vocabulary")
    parser.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    parser.add_argument("--sample-mb", type=int, default=1000, help="train on about this much text; 0 for all")
    parser.add_argument("--seed", type=int, default=1234, help="of the sample")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count() or 1, help="threads of the trainer")
    return parser


def inputs_formats() -> tuple[str, ...]:
    """Returns the input formats that can be named."""
    from megatron_samoe.datasets.preprocess.options import INPUT_FORMATS

    return INPUT_FORMATS


def _main(arguments: Sequence[str] | None) -> None:
    args = make_parser().parse_args(arguments)
    if args.vocab_size < 1:
        raise DataError(f"--vocab-size {args.vocab_size} must be at least 1.")
    made = [f"{args.output_prefix}{end}" for end in (".model", ".vocab", ".json", "-vocab.json", "-merges.txt")]
    existing = [path for path in made if os.path.exists(path)]
    if existing and not args.overwrite:
        raise DataError(f"{existing[0]} exists. Give --overwrite to replace it, or another --output-prefix.")
    options = PreprocessOptions(
        input=tuple(args.input), output_prefix=args.output_prefix, input_format=args.input_format,
        json_keys=tuple(args.json_keys), on_bad_input=args.on_bad_input, chunk_bytes=1 << 20,
    )  # fmt: skip
    texts = corpus_texts(options, args.sample_mb << 20, args.seed)
    first = next(texts, None)
    if first is None:
        raise DataError("The corpus is empty: no text to train a tokenizer on.")
    texts = _chain(first, texts)
    if args.type == "byte-bpe":
        path = train_byte_bpe(texts, args.vocab_size, args.output_prefix)
    else:
        kind = args.type.removeprefix("sentencepiece-")
        path = train_sentencepiece(texts, kind, args.vocab_size, args.output_prefix, args.num_threads)
    print(f"wrote {path}")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run(_main, arguments)


if __name__ == "__main__":
    sys.exit(main())
