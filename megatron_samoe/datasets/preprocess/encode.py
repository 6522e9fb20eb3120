"""A worker's part: reads, cleans and tokenizes a chunk into arrays that are ready to be written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from megatron_samoe.datasets.index_format import optimal_dtype
from megatron_samoe.datasets.preprocess import cleaning, dedup, records
from megatron_samoe.datasets.preprocess.inputs import Chunk
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.errors import DataError


@dataclass
class Column:
    """The ids of one key: tokens joined, tokens per sequence (int32), sequences per document (int32)."""

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray

    def document_sizes(self, itemsize: int) -> np.ndarray:
        """Returns bytes of tokens and sequences of each document, [documents, 2]."""
        owners = np.repeat(np.arange(len(self.sequences)), self.sequences)
        tokens = np.bincount(owners, weights=self.lengths, minlength=len(self.sequences)).astype(np.int64)
        return np.stack([tokens * itemsize, self.sequences], axis=1)

    def keep(self, documents: np.ndarray) -> Column:
        """Returns the column with only the documents marked in a bool array."""
        sequences = np.repeat(documents, self.sequences)
        tokens = np.repeat(sequences, self.lengths)
        return Column(self.tokens[tokens], self.lengths[sequences], self.sequences[documents])


class Encoder:
    """Holds the tokenizer of a worker and turns chunks into ids."""

    def __init__(self, options: PreprocessOptions):
        self.options = options
        self.tokenizer = tokenizer_of(options)
        self.dtype = optimal_dtype(self.tokenizer.vocab_size)
        self._cleaner = cleaning.Cleaner(options)

    def encode(self, chunk: Chunk) -> tuple[list[Column], records.Counts, np.ndarray | None]:
        """Returns a chunk as ids, its counts, and its de-duplication keys, if any, uint64 [documents, bands].

        Documents that cannot be used are counted, none raises.
        """
        read = records.read(chunk, self.options)
        documents, lines = self._clean(read)
        columns, failed = self._encode_columns(documents)
        if failed:
            read.counts.bad.extend((lines[number], reason) for number, reason in failed.items())
            documents = [document for number, document in enumerate(documents) if number not in failed]
        read.counts.bad.sort()
        return columns, read.counts, self._dedup_keys(documents)

    def _clean(self, read: records.Records) -> tuple[list[tuple[str, ...]], list[int]]:
        kept, lines = [], []
        for document, line in zip(read.documents, read.lines, strict=True):
            document, reason = self._cleaner.clean(document)
            if reason is None:
                kept.append(document)
                lines.append(line)
            else:
                read.counts.left_out[reason] += 1
        return kept, lines

    def _encode_columns(self, documents: list[tuple[str, ...]]) -> tuple[list[Column], dict[int, str]]:
        """Returns a column per key, and the documents (by number) that the tokenizer refused."""
        num_keys = len(self.options.json_keys)
        texts = [[document[key] for document in documents] for key in range(num_keys)]
        try:
            return [self._encode_texts(column) for column in texts], {}
        except (DataError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # engines in Rust raise their panics outside Exception
            failed = self._find_refused(documents)
        keep = [number for number in range(len(documents)) if number not in failed]
        return [self._encode_texts([column[number] for number in keep]) for column in texts], failed

    def _find_refused(self, documents: list[tuple[str, ...]]) -> dict[int, str]:
        failed = {}
        for number, document in enumerate(documents):
            try:
                for text in document:
                    self._encode_texts([text])
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException as error:
                failed[number] = f"the tokenizer failed: {type(error).__name__}: {str(error)[:80]}"
        return failed

    def _encode_texts(self, texts: list[str]) -> Column:
        options = self.options
        if options.split_sentences:
            split = [cleaning.split_sentences(text, options.keep_newlines) for text in texts]
            owners = np.repeat(np.arange(len(texts)), list(map(len, split)))
            tokens, lengths = self.tokenizer.encode_arrays(list(chain.from_iterable(split)))
        else:
            owners = np.arange(len(texts))
            tokens, lengths = self.tokenizer.encode_arrays(texts)
        # A sequence without tokens is left out; a document without sequences stays, as a boundary (Megatron's rule).
        used = lengths > 0
        owners, lengths = owners[used], lengths[used]
        sequences = np.bincount(owners, minlength=len(texts)).astype(np.int32)
        if options.append_eod and len(lengths):
            is_last = np.append(owners[1:] != owners[:-1], True)
            tokens = np.insert(tokens, np.cumsum(lengths)[is_last], self.tokenizer.eod)
            lengths = lengths + is_last
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.tokenizer.vocab_size:
                raise DataError(
                    f"The tokenizer returned the id {low if low < 0 else high}, outside its vocabulary of "
                    f"{self.tokenizer.vocab_size}: its files do not belong together."
                )
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError("A document has more than 2^31 - 1 tokens, which the format cannot hold: split it.")
        return Column(tokens.astype(self.dtype), lengths.astype(np.int32), sequences)

    def _dedup_keys(self, documents: list[tuple[str, ...]]) -> np.ndarray | None:
        if self.options.deduplicate == "none":
            return None
        if self.options.deduplicate == "exact":
            rows, width = [dedup.exact_key(document) for document in documents], 1
        else:
            rows = [dedup.minhash_keys(document, self.options.minhash_threshold) for document in documents]
            width = dedup.choose_bands(self.options.minhash_threshold)[0]
        return np.array(rows, dtype=np.uint64).reshape(len(documents), width)
