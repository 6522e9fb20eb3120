"""Looks at a dataset: counts, checks, documents, repair."""

from __future__ import annotations

import argparse
import json
import sys

from megatron_samoe.cli.arguments import Options, Parser, Words, add_tokenizer_arguments, adder, program, sub_commands
from megatron_samoe.datasets import index_format, manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, get_idx_path
from megatron_samoe.datasets.inspect import plot, repair, statistics, verify
from megatron_samoe.errors import DataError


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Looks at a dataset.")
    command_for = sub_commands(parser)
    for name, text in (
        ("stats", "counts and quantiles, as JSON; --plot draws histograms"),
        ("verify", "check index, data and manifest"),
        ("decode", "print a document"),
        ("repair", "rebuild a missing or broken .idx from .bin and the end-of-document token"),
    ):
        command = command_for(name, text)
        add = adder(command)
        add("prefix", str, "path of the dataset without .bin and .idx")
        if name == "stats":
            add("--plot", str, "file for histograms of document lengths and ids", metavar="PNG")
        elif name == "decode":
            add("--document", 0, "number of the document, from 0")
            add("--max-tokens", 2000, "print at most this many tokens")
            add_tokenizer_arguments(command, required=False)
        elif name == "repair":
            add("--dtype", str, "of the tokens: uint16, int32, ...; default: the manifest's")
            add("--eod", int, "end-of-document id; default: the manifest's")
    return parser


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    args = make_parser().parse_args(words)
    prefix = args.prefix.removesuffix(".bin").removesuffix(".idx")
    if args.command == "stats":
        data = IndexedDataset(prefix)
        print(json.dumps(statistics(data), indent=1))
        if args.plot:
            plot(data, args.plot)
    elif args.command == "verify":
        print("\n".join(f"ok: {line}" for line in verify(prefix)))
    elif args.command == "decode":
        _decode(prefix, args)
    else:
        record = manifest.read(prefix)
        if record is None and (args.dtype is None or args.eod is None):
            raise DataError(f"{prefix} has no manifest: give --dtype and --eod.")
        dtype = args.dtype or str(index_format.optimal_dtype(record.vocab_size if record else None))
        documents, tokens = repair(prefix, dtype, record.eod if args.eod is None and record else args.eod)
        print(f"{get_idx_path(prefix)}: {documents:,} documents, {tokens:,} tokens")


def _decode(prefix: str, args: Options) -> None:
    from megatron_samoe.datasets.tokenizer import tokenizer_of

    data = IndexedDataset(prefix)
    if not 0 <= args.document < data.num_documents:
        raise DataError(f"--document {args.document} is not in 0 to {data.num_documents - 1}.")
    ids = data.document(args.document)[: args.max_tokens].tolist()
    if args.tokenizer_type is None:
        print(" ".join(map(str, ids)))
        return
    tokenizer = tokenizer_of(args)
    record = manifest.read(prefix)
    if record is not None and record.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(f"{prefix} was made with another tokenizer ({record.tokenizer_type}).")
    if ids and max(ids) >= tokenizer.vocab_size:
        raise DataError(f"{prefix} holds id {max(ids)}, outside the {tokenizer.vocab_size} entries of this tokenizer.")
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    sys.exit(main())
