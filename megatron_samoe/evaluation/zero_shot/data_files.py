"""Rows and texts of files: JSON, JSON lines, Parquet and plain text, as they are or packed with xz or gzip."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.errors import DataError, optional_import
from megatron_samoe.parsing import parse_json, read_file

#: A few packed bytes can expand to gigabytes; texts shrink to a fifth or so.
LEAST_LIMIT, MOST_TIMES = 64 << 20, 100
KINDS = (".jsonl", ".json", ".parquet", ".txt")
PACKINGS = ("", ".xz", ".gz")


class NoDataError(DataError):
    """A task's data is not there (as opposed to: is damaged)."""


@dataclass(frozen=True)
class Document:
    """A text whose perplexity is measured."""

    name: str
    text: str


def find_data(task: str, names: Sequence[str], data_dir: Path) -> Path:
    """Returns the first of a task's files (or folders of files) that is there.

    Args:
        names: below the folder, without their endings; `*` as in a shell.

    Raises:
        NoDataError: none is; the message names all that were looked for.
    """
    for name in names:
        for ending in (kind + packing for kind in KINDS for packing in PACKINGS):
            for path in sorted(data_dir.glob(name + ending)):
                if path.is_file():
                    return path
        for path in sorted(data_dir.glob(name)):
            if path.is_dir() and _files_in(path):
                return path
    endings = "{" + ",".join(KINDS) + "}[" + "|".join(filter(None, PACKINGS)) + "]"
    looked_for = ", ".join(f"{name}{endings}" for name in names)
    raise NoDataError(f"Task {task} has no data in {data_dir}: looked for {looked_for}. --hub would fetch it.")


def _kind(path: Path) -> str:
    """Returns the suffix of a file's name without that of its packing."""
    return Path(path.name.removesuffix(".xz").removesuffix(".gz")).suffix


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _kind(path) in KINDS)


def read_rows(path: Path, labels_name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (position, row) of a file, or of a folder's files.

    Args:
        labels_name: file next to it with a label per line, where the rows don't bring theirs.

    Raises:
        DataError: something cannot be read, or labels and rows differ in number.
    """
    rows = (pair for file in (_files_in(path) if path.is_dir() else [path]) for pair in _file_rows(file))
    labels_path = path.parent / labels_name
    if not (labels_name and labels_path.is_file()):
        yield from rows
        return
    labels, listed = read_file(labels_path).decode().split(), list(rows)
    if len(labels) != len(listed):
        raise DataError(f"{path} has {len(listed)} rows, {labels_name} next to it {len(labels)} labels.")
    for (where, row), label in zip(listed, labels, strict=True):
        yield where, {**row, "label": label}


def read_text(path: Path) -> str:
    """Returns a file's text, unpacked; DataError if it cannot be read."""
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix)
    try:
        if opener is None:
            return read_file(path, None).decode("utf-8")
        with opener(path, "rb") as file:
            most = max(LEAST_LIMIT, MOST_TIMES * path.stat().st_size)
            content = file.read(most + 1)
            if len(content) > most:
                raise DataError(
                    f"{path} holds more than {most >> 20} MiB when unpacked, which no text of its size does."
                )
        return str(content, "utf-8")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = _kind(path)
    for number, row in _parquet_rows(path) if kind == ".parquet" else _text_rows(read_text(path), kind, path):
        where = f"{path.name}:{number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is no row with fields, but {type(row).__name__}.")
        yield where, row


def _text_rows(text: str, kind: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields numbered rows of JSON lines, of one JSON document, or of plain lines ({"text": line}).

    Files called .json may hold JSON lines, those called .jsonl or .txt one document: publishers do both.
    """
    lines = text.split("\n")
    first = text.lstrip()[:1]
    if kind == ".txt" and first != "{":
        yield from ((n, {"text": line.removesuffix("\r")}) for n, line in enumerate(lines, 1) if line.strip())
        return
    try:
        if kind == ".jsonl":
            raise ValueError("read as lines")
        parsed = parse_json(text)
    except ValueError:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, parse_json(line)
                except ValueError as error:
                    raise DataError(f"{path.name}:{number} is no JSON: {error}.") from None
        return
    if isinstance(parsed, Mapping):
        listed = [parsed[name] for name in ("Data", "data") if isinstance(parsed.get(name), list)]
        parsed = listed[0] if listed else [parsed]
    if not isinstance(parsed, list):
        raise DataError(f"{path.name} holds no rows, but {type(parsed).__name__}.")
    yield from enumerate(parsed, 1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    parquet = optional_import("pyarrow.parquet", "data", str(path))
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    yield from enumerate(table.to_pylist(), 1)


def read_documents(path: Path, limit: int | None = None) -> list[Document]:
    """Returns the texts of a file: the field "text" of each row, or a .txt file as one; DataError without any."""
    if not path.is_file():
        raise NoDataError(f"--corpus {path} is {'a folder; name files' if path.is_dir() else 'not there'}.")
    if _kind(path) not in (".jsonl", ".json", ".parquet"):
        documents = [Document(path.name, read_text(path))]
    else:
        documents = []
        for where, row in _file_rows(path):
            if not isinstance(row.get("text"), str):
                raise DataError(f'{where} has no field "text"; it has {", ".join(map(str, row))}.')
            documents.append(Document(where, row["text"]))
    documents = [document for document in documents if document.text][:limit]
    if not documents:
        raise DataError(f"{path} holds no text.")
    return documents
