"""Trains a tokenizer on text."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from itertools import chain

from megatron_samoe.cli.program import program
from megatron_samoe.datasets.preprocess.options import InputFormat, OnBadInput, PreprocessOptions
from megatron_samoe.datasets.train_tokenizer import TokenizerKind, corpus_texts, train_byte_bpe, train_sentencepiece
from megatron_samoe.errors import DataError, some


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Trains a tokenizer on text."""

    type: TokenizerKind
    """kind of tokenizer"""
    input: tuple[str, ...]
    """files, globs or folders, as for megatron-samoe preprocess"""
    input_format: InputFormat = "auto"
    """auto goes by the file's name"""
    json_keys: tuple[str, ...] = ("text",)
    """keys (Parquet: columns) to train on"""
    on_bad_input: OnBadInput = "fail"
    """for lines that are not a document"""
    vocab_size: int
    """entries of the vocabulary"""
    output_prefix: str
    """path of the output without suffix"""
    overwrite: bool = False
    """replace an existing tokenizer"""
    sample_mb: int = 1000
    """train on about this much text; 0 for all"""
    seed: int = 1234
    """of the sample"""
    num_threads: int = os.cpu_count() or 1
    """threads of the trainer"""

    def run(self) -> None:
        if self.vocab_size < 1:
            raise DataError(f"--vocab-size {self.vocab_size} must be at least 1.")
        made = [f"{self.output_prefix}{end}" for end in (".model", ".vocab", ".json", "-vocab.json", "-merges.txt")]
        existing = [path for path in made if os.path.exists(path)]
        if existing and not self.overwrite:
            raise DataError(f"{existing[0]} exists. Give --overwrite to replace it, or another --output-prefix.")
        options = PreprocessOptions(
            input=self.input,
            output_prefix=self.output_prefix,
            input_format=self.input_format,
            json_keys=self.json_keys,
            on_bad_input=self.on_bad_input,
            chunk_bytes=1 << 20,
        )
        os.makedirs(options.folder, exist_ok=True)
        texts = corpus_texts(options, self.sample_mb << 20, self.seed)
        first = next(texts, None)
        if first is None:
            raise DataError(f"The corpus is empty: {some(self.input)} hold no text to train a tokenizer on.")
        path, size = self._train(chain([first], texts))
        print(f"wrote {path}: {size:,} entries")
        if size < self.vocab_size:
            print(
                f"note: {self.vocab_size:,} were asked for, and the text has no more pairs of tokens to merge; more text gives more"
            )

    def _train(self, texts: chain[str]) -> tuple[str, int]:
        if self.type == "byte-bpe":
            return train_byte_bpe(texts, self.vocab_size, self.output_prefix)
        kind = self.type.removeprefix("sentencepiece-")
        # It ends with an error where the text does not give that many.
        path = train_sentencepiece(texts, kind, self.vocab_size, self.output_prefix, self.num_threads)
        return path, self.vocab_size


main = program(TrainTokenizer)

if __name__ == "__main__":
    sys.exit(main())
