"""From the bytes of a chunk to documents, and a reason for every line that gives none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_samoe.datasets.preprocess.inputs import Chunk
from megatron_samoe.datasets.preprocess.options import PreprocessOptions

try:  # about twice as fast; whatever it refuses the standard parser decides, so results do not depend on it
    import orjson

    _fast_loads: Any = orjson.loads
except ImportError:
    _fast_loads = None


@dataclass
class Records:
    """The documents of a chunk: one text per key each, and what was wrong with the rest."""

    documents: list[tuple[str, ...]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """For each document its line in the chunk, from 0."""
    bad: list[tuple[int, str]] = field(default_factory=list)
    num_lines: int = 0
    num_bytes: int = 0


def read(chunk: Chunk, options: PreprocessOptions) -> Records:
    """Returns the documents of a chunk."""
    records = Records()
    if chunk.kind == "error":
        records.bad.append((0, chunk.reason))
    elif chunk.kind in ("texts", "rows"):
        for number, row in enumerate(chunk.rows):
            texts = (row,) if chunk.kind == "texts" else row
            _take(records, number, tuple(texts), options)
            records.num_bytes += sum(len(text) for text in texts if text is not None)
        records.num_lines = len(chunk.rows)
    else:
        first_line = chunk.new_file
        lines = _range_lines(chunk, options) if chunk.kind == "range" else _split(chunk.data)
        for number, line in enumerate(lines):
            records.num_lines += 1
            records.num_bytes += len(line) + 1
            if first_line and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            first_line = False
            if line and not line.isspace():
                _parse(records, number, line, options)
    return records


def _split(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _range_lines(chunk: Chunk, options: PreprocessOptions) -> Iterator[bytes]:
    """Yields the lines of a file that start in [start, end)."""
    limit = options.max_document_bytes * 2
    with open(chunk.file, "rb") as file:
        start = chunk.start
        if start:
            # The line that reaches over the border belongs to the chunk it starts in.
            file.seek(start - 1)
            start = _skip_line(file, start - 1)
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


def _skip_line(file: Any, position: int) -> int:
    """Returns where the line after the one at `position` starts, reading in bounded steps."""
    while block := file.readline(1 << 20):
        position += len(block)
        if block.endswith(b"\n"):
            break
    return position


def _parse(records: Records, number: int, line: bytes, options: PreprocessOptions) -> None:
    if len(line) > options.max_document_bytes:
        records.bad.append(
            (number, f"the line is longer than the {options.max_document_bytes >> 20} MB of --max-document-mb")
        )
        return
    value: Any = None
    parsed = False
    if _fast_loads is not None:
        try:
            value, parsed = _fast_loads(line), True
        except ValueError:
            pass
    if not parsed:
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            records.bad.append((number, f"byte {error.start + 1} of the line is not UTF-8"))
            return
        except json.JSONDecodeError as error:
            records.bad.append((number, f"not JSON: {error.msg} at column {error.colno}"))
            return
        except (ValueError, RecursionError) as error:
            records.bad.append((number, f"not usable JSON: {str(error)[:80]}"))
            return
    if not isinstance(value, dict):
        records.bad.append((number, f"a JSON object was expected, not {type(value).__name__}"))
        return
    texts: tuple[Any, ...] = tuple(value.get(key) for key in options.json_keys)
    for key, text in zip(options.json_keys, texts, strict=True):
        if not isinstance(text, str):
            found = f"{type(text).__name__} under the key {key!r}, not a text" if key in value else f"no key {key!r}"
            records.bad.append((number, found))
            return
    if b"\\u" in line and not all(map(_encodable, texts)):
        records.bad.append((number, "half of a surrogate pair"))
        return
    records.documents.append(texts)
    records.lines.append(number)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _take(records: Records, number: int, texts: tuple[Any, ...], options: PreprocessOptions) -> None:
    """Adds a document of a text or Parquet file."""
    decoded = []
    for key, text in zip(options.json_keys, texts, strict=False):
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                records.bad.append((number, f"byte {error.start + 1} of the document is not UTF-8"))
                return
        if not isinstance(text, str):
            found = "null" if text is None else type(text).__name__
            records.bad.append((number, f"{found} in the column {key!r}, not a text"))
            return
        if len(text) > options.max_document_bytes:
            records.bad.append((number, f"longer than the {options.max_document_bytes >> 20} MB of --max-document-mb"))
            return
        decoded.append(text)
    records.documents.append(tuple(decoded))
    records.lines.append(number)
