"""Looks at a dataset: counts, checks, documents, repair."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from megatron_samoe.cli.program import Group, program
from megatron_samoe.config.data import TokenizerType
from megatron_samoe.datasets import index_format, manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, get_idx_path
from megatron_samoe.datasets.inspect import plot, repair, statistics, verify
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.errors import DataError


@dataclass(frozen=True, kw_only=True)
class _OfDataset:
    prefix: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PREFIX")]
    """path of the dataset without .bin and .idx"""

    @property
    def path(self) -> str:
        return self.prefix.removesuffix(".bin").removesuffix(".idx")


@dataclass(frozen=True, kw_only=True)
class Stats(_OfDataset):
    """counts and quantiles, as JSON; --plot draws histograms"""

    plot: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """file for histograms of document lengths and ids"""

    def run(self) -> None:
        data = IndexedDataset(self.path)
        print(json.dumps(statistics(data), indent=1))
        if self.plot:
            plot(data, self.plot)


@dataclass(frozen=True, kw_only=True)
class Verify(_OfDataset):
    """check index, data and manifest"""

    def run(self) -> None:
        print("\n".join(f"ok: {line}" for line in verify(self.path)))


@dataclass(frozen=True, kw_only=True)
class Decode(_OfDataset):
    """print a document"""

    document: int = 0
    """number of the document, from 0"""
    max_tokens: int = 2000
    """print at most this many tokens"""
    tokenizer_type: TokenizerType | None = None
    """kind of tokenizer"""
    tokenizer_model: str | None = None
    """SentencePiece .model, or tokenizer.json"""
    vocab_file: str | None = None
    """GPT-2 vocabulary (JSON)"""
    merge_file: str | None = None
    """GPT-2 merges"""

    def run(self) -> None:
        data = IndexedDataset(self.path)
        if not 0 <= self.document < data.num_documents:
            raise DataError(f"--document {self.document} is not in 0 to {data.num_documents - 1}.")
        ids = data.document(self.document)[: self.max_tokens].tolist()
        if self.tokenizer_type is None:
            print(" ".join(map(str, ids)))
            return
        tokenizer = tokenizer_of(self)
        record, num_entries = manifest.read(self.path), tokenizer.vocab_size
        if record is not None and record.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(f"{self.path} was made with another tokenizer ({record.tokenizer_type}).")
        if ids and max(ids) >= num_entries:
            raise DataError(f"{self.path} holds id {max(ids)}, outside the {num_entries} entries of this tokenizer.")
        print(tokenizer.decode(ids))


@dataclass(frozen=True, kw_only=True)
class Repair(_OfDataset):
    """rebuild a missing or broken .idx from .bin and the end-of-document token"""

    dtype: str | None = None
    """of the tokens: uint16, int32, ...; default: the manifest's"""
    eod: int | None = None
    """end-of-document id; default: the manifest's"""

    def run(self) -> None:
        record = manifest.read(self.path)
        eod = self.eod if self.eod is not None or record is None else record.eod
        if eod is None or (record is None and self.dtype is None):
            raise DataError(f"{self.path} has no manifest: give --dtype and --eod.")
        dtype = self.dtype or str(index_format.optimal_dtype(record.vocab_size if record else None))
        documents, tokens = repair(self.path, dtype, eod)
        print(f"{get_idx_path(self.path)}: {documents:,} documents, {tokens:,} tokens")


COMMANDS = Group({"stats": Stats, "verify": Verify, "decode": Decode, "repair": Repair}, "Looks at a dataset.")
main = program(COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
