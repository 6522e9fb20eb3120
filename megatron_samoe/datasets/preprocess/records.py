"""From the bytes of a chunk to documents, and a reason for every line that gives none."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_samoe.datasets.preprocess.inputs import BadLines, Chunk
from megatron_samoe.datasets.preprocess.options import PreprocessOptions

try:  # about twice as fast; whatever it refuses the standard parser decides, so results do not depend on it
    import orjson

    _fast_loads: Any = orjson.loads
except ImportError:
    _fast_loads = None


_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")
#: The texts of a document, or the reason why it has none.
Found = tuple[str, ...] | str


@dataclass
class Counts:
    """Lines and bytes of text of a chunk, its bad lines, and the number of documents left out, by reason."""

    lines: int = 0
    bytes: int = 0
    bad: BadLines = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class Records:
    """The documents of a chunk: one text per key each, and what was wrong with the rest."""

    documents: list[tuple[str, ...]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """For each document its line in the chunk, from 0."""
    counts: Counts = field(default_factory=Counts)

    def add(self, number: int, found: Found) -> None:
        """Adds what a line holds."""
        if isinstance(found, str):
            self.counts.bad.append((number, found))
        else:
            self.documents.append(found)
            self.lines.append(number)


def read(chunk: Chunk, options: PreprocessOptions) -> Records:
    """Returns the documents of a chunk."""
    records = Records()
    counts = records.counts
    if chunk.kind == "error":
        counts.bad.append((0, chunk.reason))
    elif chunk.kind in ("texts", "rows"):
        for number, row in enumerate(chunk.rows):
            texts = (row,) if chunk.kind == "texts" else row
            records.add(number, _decode(texts, options, is_first=number == 0))
            counts.bytes += sum(len(text) for text in texts if isinstance(text, (str, bytes)))
        counts.lines = len(chunk.rows)
    else:
        lines = _range_lines(chunk, options) if chunk.kind == "range" else chunk.data.removesuffix(b"\n").split(b"\n")
        for number, line in enumerate(lines):
            counts.lines += 1
            counts.bytes += len(line) + 1
            if number == 0 and chunk.new_file:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                records.add(number, _parse(line, options))
    return records


def _range_lines(chunk: Chunk, options: PreprocessOptions) -> Iterator[bytes]:
    """Yields the lines of a file that start in [start, end)."""
    limit = options.max_document_bytes * 2
    with open(chunk.file, "rb") as file:
        start = chunk.start
        if start:
            # The line that reaches over the border belongs to the chunk it starts in.
            file.seek(start - 1)
            start = _next_line(file, start - 1, chunk.end)
        if start >= chunk.end:
            return
        file.seek(start)
        data = file.read(chunk.end - start)
        lines = data.split(b"\n")
        tail = lines.pop()
        yield from lines
        if tail:
            rest = file.readline(limit)
            yield (tail + rest).removesuffix(b"\n")


def _next_line(file: Any, position: int, end: int) -> int:
    """Returns where the line after the one at `position` starts; `end` if that is not before it.

    It reads no further, or a line of many chunks would be read by each of them up to its end.
    """
    while position < end and (block := file.readline(min(1 << 20, end - position))):
        position += len(block)
        if block.endswith(b"\n"):
            return position
    return end


def _parse(line: bytes, options: PreprocessOptions) -> Found:
    """Returns the document of a line of JSON."""
    if len(line) > options.max_document_bytes:
        return f"the line is longer than the {options.max_document_bytes >> 20} MB of --max-document-mb"
    try:
        value = _loads(line)
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} of the line is not UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not usable JSON: {str(error)[:80]}"
    if not isinstance(value, dict):
        return f"a JSON object was expected, not {type(value).__name__}"
    texts: tuple[Any, ...] = tuple(value.get(key) for key in options.json_keys)
    for key, text in zip(options.json_keys, texts, strict=True):
        if not isinstance(text, str):
            return (
                f"{type(text).__name__} under the key {key!r}, not a text"
                if key in value
                else f"no key {key!r} (--json-keys names others)"
            )
    if b"\\u" in line and any(map(_HALF_OF_A_PAIR.search, texts)):
        return "half of a surrogate pair"
    return texts


def _loads(line: bytes) -> Any:
    if _fast_loads is not None:
        with contextlib.suppress(ValueError):
            return _fast_loads(line)
    return json.loads(line.decode())


def _decode(texts: Iterable[Any], options: PreprocessOptions, is_first: bool) -> Found:
    """Returns the document of a row of a text or Parquet file."""
    decoded = []
    for key, text in zip(options.json_keys, texts, strict=False):
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8-sig" if is_first else "utf-8")
            except UnicodeDecodeError as error:
                return f"byte {error.start + 1} of the document is not UTF-8"
        if not isinstance(text, str):
            return f"{'null' if text is None else type(text).__name__} in the column {key!r}, not a text"
        if len(text) > options.max_document_bytes:
            return f"longer than the {options.max_document_bytes >> 20} MB of --max-document-mb"
        decoded.append(text)
    return tuple(decoded)
