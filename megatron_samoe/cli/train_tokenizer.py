"""Trains a tokenizer on text."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import chain

from megatron_samoe.cli.arguments import Parser, Words, adder, program
from megatron_samoe.datasets.preprocess.options import INPUT_FORMATS, PreprocessOptions
from megatron_samoe.datasets.train_tokenizer import TYPES, corpus_texts, train_byte_bpe, train_sentencepiece
from megatron_samoe.errors import DataError


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Trains a tokenizer on text.")
    add = adder(parser)
    add("--type", TYPES, "kind of tokenizer", required=True)
    add("--input", [str], "files, globs or folders, as for megatron-samoe preprocess", required=True)
    add("--input-format", INPUT_FORMATS, "auto goes by the file's name", default="auto")
    add("--json-keys", ["text"], "keys (Parquet: columns) to train on")
    add("--on-bad-input", ("skip", "fail"), "for lines that are no document", default="fail")
    add("--vocab-size", int, "entries of the vocabulary", required=True)
    add("--output-prefix", str, "path of the output without suffix", required=True)
    add("--overwrite", bool, "replace an existing tokenizer")
    add("--sample-mb", 1000, "train on about this much text; 0 for all")
    add("--seed", 1234, "of the sample")
    add("--num-threads", os.cpu_count() or 1, "threads of the trainer")
    return parser


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    args = make_parser().parse_args(words)
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
    texts = chain([first], texts)
    if args.type == "byte-bpe":
        path, size = train_byte_bpe(texts, args.vocab_size, args.output_prefix)
    else:
        kind = args.type.removeprefix("sentencepiece-")
        # It ends with an error where the text does not give so many.
        path, size = (
            train_sentencepiece(texts, kind, args.vocab_size, args.output_prefix, args.num_threads),
            args.vocab_size,
        )
    print(f"wrote {path}: {size:,} entries")
    if size < args.vocab_size:
        print(
            f"note: {args.vocab_size:,} were asked for, and the text has no more pairs of tokens to merge; more text gives more"
        )


if __name__ == "__main__":
    sys.exit(main())
