"""The options of a preprocessing run."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from megatron_samoe.config.data import TokenizerType
from megatron_samoe.errors import DataError, nearest
from megatron_samoe.parsing import JsonObject

DEFAULT_CHUNK_BYTES = 1 << 20
InputFormat = Literal["auto", "jsonl", "text", "parquet"]
OnBadInput = Literal["fail", "skip"]
# These change how a run goes, not what it writes.
_NOT_IN_OUTPUT = (
    "workers",
    "resume",
    "on_bad_input",
    "executor",
    "log_interval",
    "quiet",
    "overwrite",
    "partitions",
    "keep_sequential_samples",
)


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of a run."""

    input: tuple[str, ...]
    """files, globs, folders, URLs, or - for standard input"""
    output_prefix: str
    """path of the output without _{key}_document.bin"""
    tokenizer_type: TokenizerType = "ByteTokenizer"
    """kind of tokenizer"""
    tokenizer_model: str | None = None
    """SentencePiece .model, or tokenizer.json"""
    vocab_file: str | None = None
    """GPT-2 vocabulary (JSON)"""
    merge_file: str | None = None
    """GPT-2 merges"""
    input_format: InputFormat = "auto"
    """auto goes by the file's name"""
    json_keys: tuple[str, ...] = ("text",)
    """keys (Parquet: columns); a dataset for each"""
    document_separator: str | None = None
    """text files: a line that matches this regular expression at its start begins a new document (and stays in it);
    blank-line means empty lines. Without it and --document-kb a file is one document"""
    document_bytes: int = 0
    """text files: a document ends at the first blank line after so many, at twice as many anywhere"""
    split_sentences: bool = False
    """a sequence per sentence"""
    keep_newlines: bool = False
    """keep white space between sentences"""
    on_bad_input: OnBadInput = "fail"
    """what to do with a line that is not a document; skip reports the count and the first 20"""
    max_document_bytes: int = 256 << 20
    """a longer line or document is bad input"""
    input_shard: str = "0/1"
    """take the I-th of N parts of the input files: for job arrays; join with megatron-samoe merge"""
    fix_unicode: bool = False
    """repair mojibake with ftfy"""
    min_chars: int = 0
    """leave out shorter documents"""
    max_chars: int = 0
    """leave out longer documents; 0 for no limit"""
    languages: tuple[str, ...] = ()
    """keep documents in these languages (py3langid codes)"""
    deduplicate: Literal["none", "exact", "minhash"] = "none"
    """leave out documents equal, or nearly equal, to an earlier one"""
    minhash_threshold: float = 0.8
    """overlap from which minhash drops (about)"""
    append_eod: bool = False
    """end each document with the end-of-document token"""
    resume: bool = False
    """go on with a run that was stopped"""
    workers: int = 1
    """worker processes"""
    executor: Literal["process", "ray", "inline"] = "process"
    """where workers run; ray: a Ray cluster (RAY_ADDRESS, else one on this machine)"""
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """text handed to a worker at once"""
    log_interval: int = 1000
    """documents between lines in a log file"""
    quiet: bool = False
    """no progress"""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(PreprocessOptions).items():
            value, allowed = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in allowed:
                flag = f"--{name.replace('_', '-')}"
                hint = nearest(value, allowed)
                raise DataError(f"{flag} {value!r} is not known; allowed are {', '.join(allowed)}.{hint}")
        if not self.input:
            raise DataError("No input: give --input with files, globs, folders, or - for standard input.")
        if self.workers < 1:
            raise DataError(f"--workers {self.workers} must be at least 1.")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise DataError(f"--json-keys {' '.join(self.json_keys)} must name each key once, and at least one.")
        if self.chunk_bytes < 1 or self.max_document_bytes < 1:
            raise DataError("--chunk-mb and --max-document-mb must be above 0.")
        if self.document_bytes < 0:
            raise DataError("--document-kb must not be below 0.")
        if self.keep_newlines and not self.split_sentences:
            raise DataError("--keep-newlines only has a meaning with --split-sentences.")
        if not 0.0 < self.minhash_threshold < 1.0:
            raise DataError(f"--minhash-threshold {self.minhash_threshold} must be between 0 and 1.")
        if self.max_chars and self.max_chars < self.min_chars:
            raise DataError(
                f"--max-chars {self.max_chars} is below --min-chars {self.min_chars}: nothing would be kept."
            )
        if "://" in self.output_prefix:
            raise DataError(
                f"--output-prefix {self.output_prefix!r} must lie on this machine, not in a store of objects."
            )
        self.shard()
        self.separator()

    def separator(self) -> re.Pattern[bytes] | None:
        """Returns the pattern at whose matching lines a text file is cut, or None."""
        if self.document_separator is None:
            return None
        try:
            source = r"\s*$" if self.document_separator == "blank-line" else self.document_separator
            return re.compile(source.encode())
        except re.error as error:
            raise DataError(
                f"--document-separator {self.document_separator!r} is not a regular expression: {error}."
            ) from error

    def shard(self) -> tuple[int, int]:
        """Returns (number of this shard, number of shards)."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.input_shard)
        if not match or int(match[1]) >= int(match[2]):
            raise DataError(f"--input-shard {self.input_shard!r} must be i/n with i from 0 to n - 1.")
        return int(match[1]), int(match[2])

    @property
    def folder(self) -> str:
        """Of the output."""
        return os.path.dirname(self.output_prefix) or "."

    def dataset_prefix(self, key: str) -> str:
        """Returns the prefix of the dataset made from a JSON key."""
        return f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"

    def journal_path(self) -> str:
        return f"{self.output_prefix}.preprocess.journal"

    def output_options(self) -> JsonObject:
        """Returns the options that decide the output's bytes, for the journal and the manifest."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _NOT_IN_OUTPUT}
