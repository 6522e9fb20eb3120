"""The journal of a run: which chunks are in the output, so that a killed run resumes.

One JSON line per event after its checksum, appended: a header that says what the run is, a line per chunk in order
(sizes and checksums per key, counts, bad lines), and one that says that everything is written. Lines from the first
damaged one on, such as one cut short by a kill, are ignored. On resuming, the chunks' bytes are compared with their
checksums, so what a crash of the machine took from the disk is simply done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TextIO

from megatron_samoe.datasets.index_format import partial_paths
from megatron_samoe.datasets.preprocess import checksums
from megatron_samoe.datasets.preprocess.writer import Position, Written
from megatron_samoe.errors import DataError
from megatron_samoe.parsing import JsonObject, parse_json

REPORTED_BAD_LINES = 20


@dataclass
class Totals:
    """Sums over the chunks in the output."""

    positions: list[Position]
    crcs: list[int]
    max_token_ids: list[int]
    num_bytes: int = 0
    num_lines: int = 0
    num_bad: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first_bad: list[tuple[str, int, str]] = field(default_factory=list)
    """(file, line from 1, reason) of the first bad lines."""
    line_in_file: int = 0
    """Lines of the current file in front of the next chunk."""

    @classmethod
    def start(cls, num_keys: int) -> Totals:
        return cls([Position()] * num_keys, [0] * num_keys, [-1] * num_keys)

    def add(self, entry: JsonObject) -> None:
        """Adds the journal entry of the next chunk."""
        for key, values in enumerate(entry["keys"]):
            written = Written(*values)
            self.positions[key] = self.positions[key].after(
                written.num_bytes, written.num_sequences, written.num_documents
            )
            self.crcs[key] = checksums.combine(self.crcs[key], written.bin_crc32, written.num_bytes)
            self.max_token_ids[key] = max(self.max_token_ids[key], written.max_token_id)
        if entry["new_file"]:
            self.line_in_file = 0
        for line, reason in entry["bad"]:
            if len(self.first_bad) < REPORTED_BAD_LINES:
                self.first_bad.append((entry["file"], self.line_in_file + line + 1, reason))
        self.line_in_file += entry["lines"]
        self.num_bytes += entry["bytes"]
        self.num_lines += entry["lines"]
        self.num_bad += entry["num_bad"]
        self.left_out.update(entry["left_out"])


class Journal:
    """An open journal, locked against a second run with the same output."""

    def __init__(self, path: str):
        self.path = path
        self._file: TextIO = open(path, "a+", encoding="utf-8", errors="surrogateescape")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"Another run is writing the same output ({path} is locked).") from error

    def restart(self, header: JsonObject) -> None:
        """Forgets everything and begins with `header`."""
        self._rewrite(_line(header))

    def append(self, entry: JsonObject) -> None:
        """Adds a line."""
        self._file.write(_line(entry))
        self._file.flush()

    def _rewrite(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        """Makes what was appended survive a crash of the machine."""
        os.fsync(self._file.fileno())

    def read(self) -> tuple[JsonObject | None, list[JsonObject]]:
        """Returns (header or None, later entries), and cuts off a damaged tail."""
        self._file.seek(0)
        entries: list[JsonObject] = []
        good = 0
        for line in self._file.read().split("\n")[:-1]:
            checksum, _, text = line.partition(" ")
            if checksum != _checksum(text):
                break
            entries.append(parse_json(text))
            good += len(line.encode(errors="surrogateescape")) + 1
        self._file.seek(0, os.SEEK_END)
        os.ftruncate(self._file.fileno(), good)
        return (entries[0], entries[1:]) if entries else (None, [])

    def keep(self, header: JsonObject, entries: list[JsonObject]) -> None:
        """Continues after `entries`: what followed them is forgotten."""
        text = "".join(map(_line, [header, *entries]))
        if os.fstat(self._file.fileno()).st_size != len(text.encode()):
            self._rewrite(text)

    def close(self, remove: bool) -> None:
        """Ends the lock, and removes the file if the run is complete or never began."""
        if remove or os.fstat(self._file.fileno()).st_size == 0:
            os.unlink(self.path)
        self._file.close()


def _line(entry: JsonObject) -> str:
    text = json.dumps(entry)
    return f"{_checksum(text)} {text}\n"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='surrogateescape')):08x}"


def verified(entries: list[JsonObject], prefixes: list[str]) -> list[JsonObject]:
    """Returns the leading chunk entries whose bytes are in the partial files."""
    if not all(os.path.exists(path) for prefix in prefixes for path in partial_paths(prefix)):
        return []
    totals = Totals.start(len(prefixes))
    for number, entry in enumerate(entries):
        if entry.get("chunk") != number or len(entry["keys"]) != len(prefixes):
            return entries[:number]
        for prefix, values, position in zip(prefixes, entry["keys"], totals.positions, strict=True):
            parts = Written(*values).parts
            for path, start, (size, crc) in zip(partial_paths(prefix), position.offsets, parts, strict=True):
                if os.path.getsize(path) < start + size or checksums.file_crc32(path, start, size) != crc:
                    return entries[:number]
        totals.add(entry)
    return entries
