"""Finds the input files and cuts them into numbered chunks, the same ones whatever the number of workers.

Plain JSONL on a local disk is cut into byte ranges that workers read themselves. Everything else (compressed,
standard input, remote, text, Parquet) is read here, as a stream, and sent to the workers in pieces of about
`chunk_bytes`; nothing ever holds a complete file.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_samoe.datasets.bin_readers import filesystem, is_remote
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import DataError, nearest_file, optional_import
from megatron_samoe.log import say_once

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
}
STDIN = "-"


#: What is wrong with lines of a chunk: (line from 0, reason).
BadLines = list[tuple[int, str]]


@dataclass(frozen=True)
class InputFile:
    """One input: a path, a URL, or "-"."""

    path: str
    format: str
    compression: str
    num_bytes: int
    mtime_ns: int = 0


@dataclass(frozen=True)
class Chunk:
    """A piece of input. `kind` says which of the fields hold it.

    range: lines of `file` that start in bytes [start, end), to be read by the worker.
    lines: `data` is complete JSONL lines.
    texts: `rows` is a list of documents as bytes.
    rows: `rows` is a list of tuples, one text (or None) per key.
    error: reading `file` failed for `reason` after what earlier chunks hold.
    """

    number: int
    file: str
    kind: str
    start: int = 0
    end: int = 0
    data: bytes = b""
    rows: tuple[Any, ...] = ()
    reason: str = ""
    raw_bytes: int = 0
    """How far this chunk brings the reading of its file, in bytes on disk: for the progress bar."""
    new_file: bool = False
    """Whether this is the first chunk of its file: line numbers start again."""


def find_inputs(options: PreprocessOptions) -> list[InputFile]:
    """Returns the input files, in the order given, folders and globs sorted; DataError if one is missing."""
    paths = [path for word in options.input for path in _expand(word)]
    number, count = options.shard()
    if count > len(paths):
        raise DataError(f"--input-shard asks for {count} shards of {len(paths)} input files; give at most that many.")
    mine = paths[number * len(paths) // count : (number + 1) * len(paths) // count]
    return [_describe(path, options.input_format) for path in mine]


def _expand(word: str) -> list[str]:
    if word == STDIN or (is_remote(word) and not glob.has_magic(word)):
        return [word]
    if is_remote(word):
        fs, key = filesystem(word)
        found = sorted(fs.unstrip_protocol(name) for name in fs.glob(key))
    elif os.path.isdir(word):
        walked = [os.path.join(folder, name) for folder, _, names in os.walk(word) for name in names]
        found = sorted(path for path in walked if _format_of(path)[0] is not None)
        if len(found) < len(walked):
            all_of_it = os.path.join(word, "**")
            said = f"{word!r} has {len(walked):,} files, {len(found):,} of them named {', '.join(FORMATS)}"
            if not found:
                raise DataError(f"--input {said}. {all_of_it!r} takes all, as text.")
            say_once(f"{said}, which are read; {all_of_it!r} takes all")
    elif os.path.exists(word):
        return [word]
    else:
        found = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"--input {word!r} matches no file.{nearest_file(word)}")
    return found


def _format_of(path: str) -> tuple[str | None, str]:
    """Returns (format or None if the suffix is unknown, compression suffix or "")."""
    stem, suffix = os.path.splitext(path)
    compression = suffix if suffix in COMPRESSIONS else ""
    return FORMATS.get(os.path.splitext(stem if compression else path)[1].lower()), compression


def _describe(path: str, wanted: str) -> InputFile:
    format_, compression = _format_of(path)
    if wanted != "auto":
        format_ = wanted
    if path == STDIN:
        if format_ is None:
            raise DataError("Standard input needs --input-format jsonl, text or parquet.")
        return InputFile(path, format_, "", 0)
    if is_remote(path):
        fs, key = filesystem(path)
        try:
            size, mtime = int(fs.size(key)), 0
        except FileNotFoundError as error:
            raise DataError(f"--input {path!r} does not exist.") from error
    else:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"--input {path!r} cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"--input {path!r} is a pipe or a device, and must be a file; {STDIN} reads standard input."
            )
        size, mtime = status.st_size, status.st_mtime_ns
    if format_ is None:
        with open_stream(InputFile(path, "", compression, size)) as stream:
            format_ = "jsonl" if stream.read(4096).lstrip()[:1] == b"{" else "text"
    return InputFile(path, format_, compression, size, mtime)


def open_stream(file: InputFile) -> BinaryIO:
    """Returns the decompressed bytes of an input as a stream; DataError if it cannot be opened."""
    try:
        if file.path == STDIN:
            return sys.stdin.buffer
        if is_remote(file.path):
            fs, key = filesystem(file.path)
            raw: Any = fs.open(key, "rb")
        else:
            raw = open(file.path, "rb")
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error}.") from error
    if file.compression == ".zst":
        return _open_zstd(raw, file.path)
    openers: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    stream: BinaryIO = openers[file.compression](raw) if file.compression else raw
    return stream


def _open_zstd(raw: Any, path: str) -> BinaryIO:
    try:
        from compression import zstd  # Python 3.14 and newer

        return zstd.ZstdFile(raw)
    except ImportError:
        pass
    zstandard = optional_import("zstandard", "data", path)
    return io.BufferedReader(_ZstdStream(raw, zstandard), 1 << 20)  # type: ignore


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames; a file that ends inside one is an error (zstandard's own reader stays silent)."""

    def __init__(self, raw: BinaryIO, zstandard: Any):
        self.fileobj = raw
        # The window a frame may ask for is bounded: a lying header cannot demand gigabytes.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            # Small pieces: a few bytes may expand to 128 KB.
            self._input = self._input or self.fileobj.read(4096)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def read_errors() -> tuple[type[BaseException], ...]:
    """Returns what a damaged compressed or Parquet stream may raise."""
    libraries = {"zstandard": "ZstdError", "compression.zstd": "ZstdError", "pyarrow": "ArrowException"}
    loaded = [getattr(sys.modules[name], error) for name, error in libraries.items() if name in sys.modules]
    return (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, MemoryError, *loaded)


def cut(files: list[InputFile], options: PreprocessOptions) -> Iterator[Chunk]:
    """Yields the chunks of all files, numbered from 0."""
    number = 0
    for file in files:
        new_file = True
        try:
            for fields in _cut_file(file, options):
                yield Chunk(number, file.path, new_file=new_file, **fields)
                number, new_file = number + 1, False
        except read_errors() as error:
            reason = f"cannot be read any further: {str(error) or type(error).__name__}"
            yield Chunk(number, file.path, "error", reason=reason, new_file=new_file)
            number += 1


def _cut_file(file: InputFile, options: PreprocessOptions) -> Iterator[dict[str, Any]]:
    """Yields the chunks of a file, each as keyword arguments of Chunk; "raw_bytes" is how far the file is read, for progress."""
    is_local = not file.compression and file.path != STDIN and not is_remote(file.path)  # workers read ranges of it
    if file.format == "parquet":
        yield from _cut_parquet(file, options, is_local)
    elif file.format == "jsonl" and is_local:
        start = 0
        while start < file.num_bytes:
            # Small pieces first: all workers are busy, and the first tokens written, at once.
            size = options.chunk_bytes if start >= options.chunk_bytes else max(options.chunk_bytes // 8, 1)
            end = min(start + size, file.num_bytes)
            yield {"kind": "range", "start": start, "end": end, "raw_bytes": end}
            start = end
    else:
        with open_stream(file) as stream:
            if file.format == "jsonl":
                yield from _cut_lines(stream, options)
            else:
                yield from _cut_text(stream, options)


def _position(stream: BinaryIO) -> int:
    """Returns how far the file under a decompressing stream was read, 0 if it does not say."""
    inner = getattr(getattr(stream, "raw", stream), "fileobj", None) or getattr(stream, "_fp", None) or stream
    try:
        return int(inner.tell())
    except (OSError, ValueError, AttributeError):
        return 0


def _cut_lines(stream: BinaryIO, options: PreprocessOptions) -> Iterator[dict[str, Any]]:
    """Yields pieces of at least chunk_bytes that end with a line; longer only where one line is."""
    pieces: list[bytes] = []
    held = 0
    while True:
        block = stream.read(options.chunk_bytes)
        if not block:
            break
        cut_at = block.rfind(b"\n") + 1
        if cut_at == 0 and held + len(block) <= 2 * options.max_document_bytes:
            pieces.append(block)
            held += len(block)
            continue
        # A line beyond twice the limit is passed on in parts: each part is refused by the reader of lines.
        cut_at = cut_at or len(block)
        yield {"kind": "lines", "data": b"".join([*pieces, block[:cut_at]]), "raw_bytes": _position(stream)}
        pieces, held = [block[cut_at:]], len(block) - cut_at
    if held:
        yield {"kind": "lines", "data": b"".join(pieces), "raw_bytes": _position(stream)}


def _cut_text(stream: BinaryIO, options: PreprocessOptions) -> Iterator[dict[str, Any]]:
    """Yields chunks of a text file, each of documents that hold about chunk_bytes together."""
    documents: list[bytes] = []
    num_bytes = 0
    for document in _text_documents(stream, options):
        documents.append(document)
        num_bytes += len(document)
        if num_bytes >= options.chunk_bytes:
            yield {"kind": "texts", "rows": tuple(documents), "raw_bytes": _position(stream)}
            documents, num_bytes = [], 0
    if documents:
        yield {"kind": "texts", "rows": tuple(documents), "raw_bytes": _position(stream)}


def _text_documents(stream: BinaryIO, options: PreprocessOptions) -> Iterator[bytes]:
    """Yields the documents of a text file; one longer than the limit comes as its first bytes (and is refused)."""
    separator, limit, enough = options.separator(), options.max_document_bytes + 1, options.document_bytes
    if separator is None and not enough:
        document = stream.read(limit)
        if document.strip():
            yield document
        return
    lines: list[bytes] = []
    held = 0
    for line in _lines(stream, min(limit, 2 * enough) if enough else limit):
        is_long = enough and held >= (2 * enough if line.strip() else enough)
        if is_long or (separator is not None and separator.match(line)):
            if document := b"".join(lines).strip(b"\r\n"):
                yield document
            lines, held = [], 0
            if not line.strip():
                continue
        if held < limit:
            lines.append(line)
            held += len(line)
    if document := b"".join(lines).strip(b"\r\n"):
        yield document


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yields the lines of a file; a longer one than the limit in parts that end after a space or between characters."""
    rest = b""
    while piece := rest + stream.readline(limit - len(rest)):
        cut = len(piece)
        if cut == limit and not piece.endswith(b"\n"):
            cut = piece.rfind(b" ") + 1 or next((i for i in range(cut - 1, cut - 4, -1) if piece[i] >> 6 != 2), cut)
        yield piece[:cut]
        rest = piece[cut:]


def _refuse_other_columns(path: str, schema: Any, keys: Iterable[str]) -> None:
    """Raises DataError where a Parquet file lacks a column, repeats it, or holds no text in it."""
    import pyarrow

    kinds = [str(kind) for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())]
    for key in keys:
        held = [field.type for field in schema if field.name == key]
        if not held:
            raise DataError(f"{path} has no column {key!r}; its columns are {', '.join(schema.names)}.")
        if len(held) > 1:
            raise DataError(f"{path} has {len(held)} columns {key!r}; a column of texts must have a name of its own.")
        kind = held[0].value_type if pyarrow.types.is_dictionary(held[0]) else held[0]
        if str(kind).removesuffix("_view") not in (*kinds, "null"):
            raise DataError(f"{path}: the column {key!r} holds {held[0]}, and must hold text: {', '.join(kinds)}.")


def _cut_parquet(file: InputFile, options: PreprocessOptions, plain: bool) -> Iterator[dict[str, Any]]:
    pyarrow_parquet = optional_import("pyarrow.parquet", "data", file.path)
    with tempfile.TemporaryFile(dir=options.folder) as spool:
        if plain:
            source: Any = file.path
        else:  # Parquet is read from its end: a stream goes to disk first
            with open_stream(file) as stream:
                shutil.copyfileobj(stream, spool, 1 << 20)
            source = spool
        parquet = pyarrow_parquet.ParquetFile(source, memory_map=False)
        _refuse_other_columns(file.path, parquet.schema_arrow, options.json_keys)
        total = max(parquet.metadata.num_rows, 1)
        groups = range(parquet.metadata.num_row_groups)
        unpacked = sum(parquet.metadata.row_group(i).total_byte_size for i in groups)
        row_bytes = max(max(file.num_bytes, unpacked) // total, 1)
        size, done = max(1, min(8192, options.chunk_bytes // row_bytes)), 0
        for batch in parquet.iter_batches(batch_size=size, columns=list(options.json_keys)):
            columns_ = [batch.column(batch.schema.get_field_index(key)).to_pylist() for key in options.json_keys]
            done += batch.num_rows
            yield {
                "kind": "rows",
                "rows": tuple(zip(*columns_, strict=True)),
                "raw_bytes": file.num_bytes * done // total,
            }
