"""Finding and reading a task's data: files below a folder, or the Hugging Face Hub."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_samoe.errors import DataError, nearest_file, optional_import, shown
from megatron_samoe.evaluation.zero_shot.items import Document
from megatron_samoe.evaluation.zero_shot.task import Task
from megatron_samoe.parsing import parse_json, read_file

#: A few packed bytes can stand for gigabytes; texts shrink to a fifth or so.
LEAST_LIMIT, MOST_TIMES = 64 << 20, 100
KINDS = (".jsonl", ".json", ".parquet", ".txt")
PACKINGS = ("", ".xz", ".gz")


class NoDataError(DataError):
    """A task's data is not there (as opposed to: is damaged)."""


def find_data(task: Task, data_dir: Path) -> Path:
    """Returns the first of a task's files (or folders of files) that is there.

    Raises:
        NoDataError: none is; the message names all that were looked for.
    """
    if not data_dir.is_dir():
        raise NoDataError(f"--data-dir {data_dir} is no folder.{nearest_file(str(data_dir))}")
    for name in task.files:
        for ending in (kind + packing for kind in KINDS for packing in PACKINGS):
            found = [p for p in _matches(task, data_dir, name + ending) if p.is_file()]
            if found:
                return found[0]
        folders = [p for p in _matches(task, data_dir, name) if p.is_dir() and _files_in(p)]
        if folders:
            return folders[0]
    endings = "{" + ",".join(KINDS) + "}[" + "|".join(filter(None, PACKINGS)) + "]"
    looked_for = ", ".join(f"{name}{endings}" for name in task.files)
    hint = " --hub would fetch it." if task.hub else ""
    raise NoDataError(f"Task {task.name} has no data in {data_dir}: looked for {looked_for}.{hint}")


def _matches(task: Task, data_dir: Path, pattern: str) -> list[Path]:
    try:
        return sorted(data_dir.glob(pattern))
    except (ValueError, NotImplementedError, OSError) as error:
        raise DataError(
            f"Task {task.name}: files has {shown(pattern)}, which names nothing below a folder: {error}."
        ) from None


def _kind(path: Path) -> str:
    """Returns the suffix of a file's name without that of its packing."""
    return Path(path.name.removesuffix(".xz").removesuffix(".gz")).suffix


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _kind(path) in KINDS)


def read_rows(task: Task, data_dir: Path | None, hub: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (place, row) of a task's data as it stands in the files.

    Raises:
        DataError: there is no data, or it cannot be read.
    """
    try:
        if data_dir is None:
            raise NoDataError(
                f"No data: --data-dir (or MEGATRON_SAMOE_EVAL_DATA) must name the folder of task {task.name}'s, or --hub fetch it."
            )
        path = find_data(task, data_dir)
    except NoDataError:
        if not hub or (data_dir is not None and not task.hub):
            raise
        yield from _hub_rows(task)
        return
    rows = (pair for file in (_files_in(path) if path.is_dir() else [path]) for pair in _file_rows(file))
    beside = path.parent / task.labels
    # Where the rows bring their labels, there is no such file.
    if not (task.labels and beside.is_file()):
        yield from rows
        return
    labels, count = read_file(beside).decode().split(), 0
    for count, (where, row) in enumerate(rows, 1):
        if count > len(labels):
            raise DataError(f"{where}: {task.labels} beside it has only {len(labels)} labels.")
        yield where, {**row, "label": labels[count - 1]}
    if len(labels) != count:
        raise DataError(f"{path} has {count} rows, {task.labels} beside it {len(labels)} labels.")


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
        whole = parse_json(text)
    except ValueError:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, parse_json(line)
                except ValueError as error:
                    raise DataError(f"{path.name}:{number} is no JSON: {error}.") from None
        return
    if isinstance(whole, Mapping):
        listed = [whole[name] for name in ("Data", "data") if isinstance(whole.get(name), list)]
        whole = listed[0] if listed else [whole]
    if not isinstance(whole, list):
        raise DataError(f"{path.name} holds no rows, but {type(whole).__name__}.")
    yield from enumerate(whole, 1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    parquet = optional_import("pyarrow.parquet", "data", str(path))
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    yield from enumerate(table.to_pylist(), 1)


def _hub_rows(task: Task) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if task.hub is None:
        raise NoDataError(f"Task {task.name} names no data set on the Hub; give --data-dir.")
    datasets = optional_import("datasets", "eval", "--hub")
    try:
        rows = datasets.load_dataset(task.hub.path, task.hub.name, split=task.hub.split)
    except Exception as error:  # the library raises many kinds
        raise NoDataError(f"Task {task.name}: the Hub's {task.hub.path} cannot be had: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{task.hub.path}:{number}", row


def read_documents(path: Path, limit: int | None = None) -> list[Document]:
    """Returns the texts of a file: the field "text" of each row, or a .txt file as one; DataError if there are none."""
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
