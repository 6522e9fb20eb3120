"""What a preprocessing run is told."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass

from megatron_samoe.datasets.tokenizer import TOKENIZER_TYPES
from megatron_samoe.errors import DataError, nearest
from megatron_samoe.parsing import JsonObject

DEFAULT_CHUNK_BYTES = 1 << 20
INPUT_FORMATS = ("auto", "jsonl", "text", "parquet")
#: What options may be; the first is the default.
CHOICES: dict[str, tuple[str, ...]] = {
    "input_format": INPUT_FORMATS, "on_bad_input": ("fail", "skip"), "executor": ("process", "ray", "inline"),
    "deduplicate": ("none", "exact", "minhash"), "tokenizer_type": TOKENIZER_TYPES,
}  # fmt: skip
# These change how a run goes, not what it writes.
_NOT_IN_OUTPUT = ("workers", "resume", "on_bad_input", "executor", "log_interval", "quiet")


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of `megatron-samoe preprocess`; see its --help for their meaning."""

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str = "ByteTokenizer"
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    input_format: str = "auto"
    document_separator: str | None = None
    document_bytes: int = 0
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    workers: int = 1
    executor: str = "process"
    on_bad_input: str = "fail"
    resume: bool = False
    fix_unicode: bool = False
    min_chars: int = 0
    max_chars: int = 0
    languages: tuple[str, ...] = ()
    deduplicate: str = "none"
    minhash_threshold: float = 0.8
    input_shard: str = "0/1"
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    max_document_bytes: int = 256 << 20
    log_interval: int = 1000
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
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
        folder = os.path.dirname(self.output_prefix) or "."
        if not os.path.isdir(folder):
            raise DataError(f"The folder {folder!r} of --output-prefix does not exist.")
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
                f"--document-separator {self.document_separator!r} is no regular expression: {error}."
            ) from error

    def shard(self) -> tuple[int, int]:
        """Returns (number of this shard, number of shards)."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.input_shard)
        if not match or int(match[1]) >= int(match[2]):
            raise DataError(f"--input-shard {self.input_shard!r} must be i/n with i from 0 to n - 1.")
        return int(match[1]), int(match[2])

    def dataset_prefix(self, key: str) -> str:
        """Returns the prefix of the dataset made from a JSON key."""
        return f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"

    def journal_path(self) -> str:
        return f"{self.output_prefix}.preprocess.journal"

    def output_options(self) -> JsonObject:
        """Returns the options that decide the output's bytes, for the journal and the manifest."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _NOT_IN_OUTPUT}
