"""Where the tokens of a dataset come from: a memory map, ordinary reads, or ranges of a remote object."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from megatron_samoe.datasets.mapped_file import MappedFile, require_whole
from megatron_samoe.errors import DataError
from megatron_samoe.installation import install_extra


class BinReader(ABC):
    """Reads tokens by byte offset.

    Attributes:
        path: file or URL.
        num_bytes: its size.
    """

    path: str
    num_bytes: int

    def read(self, dtype: np.dtype, count: int, offset_bytes: int) -> np.ndarray:
        """Returns `count` tokens of `dtype` from byte `offset_bytes` on; DataError outside the file."""
        size = count * dtype.itemsize
        if size < 0 or offset_bytes < 0 or offset_bytes + size > self.num_bytes:
            raise DataError(
                f"{self.path}: bytes {offset_bytes} to {offset_bytes + size} were asked for, but the file has {self.num_bytes}. "
                "The index and the data do not belong together, or the data were truncated after the start."
            )
        return self._bytes(offset_bytes, size).view(dtype)

    @abstractmethod
    def _bytes(self, start: int, size: int) -> np.ndarray:
        """Returns bytes that are inside the file, uint8 [size]."""


class MMapBinReader(BinReader):
    """Memory-mapped reads: no copy, the kernel caches."""

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb") as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            # An empty file cannot be mapped.
            mapped = MappedFile.of(file, path) if self.num_bytes else b""
        self.buffer = np.frombuffer(mapped, dtype=np.uint8)

    def _bytes(self, start: int, size: int) -> np.ndarray:
        require_whole(self.buffer)
        return self.buffer[start : start + size]


class FileBinReader(BinReader):
    """Positioned reads: for file systems where memory maps are slow or unreliable. Safe to share among threads."""

    def __init__(self, path: str):
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self._fd).st_size

    def _bytes(self, start: int, size: int) -> np.ndarray:
        out, done = np.empty(size, dtype=np.uint8), 0
        while done < size:
            got = os.preadv(self._fd, [out[done:].data], start + done)
            if got == 0:
                raise DataError(f"{self.path} ended at byte {start + done}: it was truncated while in use.")
            done += got
        return out

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)


class RemoteBinReader(BinReader):
    """Ranges of an object behind an fsspec URL (s3://, gs://, memory://, ...), in cached blocks.

    Sequences are read whole blocks at a time, since one request costs about the same for a kilobyte and a
    megabyte. At most `max_blocks` blocks are kept (least recently used are dropped).
    """

    def __init__(self, url: str, block_bytes: int = 1 << 20, max_blocks: int = 64):
        self.path, self.block_bytes = url, block_bytes
        self._fs, self._key = filesystem(url)
        self.num_bytes = int(self._fs.size(self._key))
        # Safe to share among threads, which may fetch one block twice but never wait for each other.
        self._block = functools.lru_cache(max_blocks)(self._fetch)

    def _fetch(self, number: int) -> bytes:
        start = number * self.block_bytes
        return self._fs.cat_file(self._key, start=start, end=min(start + self.block_bytes, self.num_bytes))  # type: ignore[no-any-return]

    def _bytes(self, start: int, size: int) -> np.ndarray:
        first, last = start // self.block_bytes, -(-(start + size) // self.block_bytes)
        data = b"".join(self._block(number) for number in range(first, last))
        start -= first * self.block_bytes
        if len(data) < start + size:
            raise DataError(f"{self.path} returned fewer bytes than its size of {self.num_bytes} promises.")
        return np.frombuffer(data, dtype=np.uint8)[start : start + size]


def is_remote(path: str) -> bool:
    """Returns whether `path` is a URL of a remote store rather than a file."""
    return "://" in path and not path.startswith("file://")


def filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of `url` and the path inside it; DataError if a package is missing."""
    try:
        import fsspec

        fs, key = fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = url.split("://", 1)[0]
        raise DataError(
            f"{url} needs a package for {scheme}:// that is not installed ({error}). "
            f"Install the extra: {install_extra('remote')}."
        ) from error
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {error}") from error
    return fs, key


def fetch_index(url: str, cache_path: str | None) -> str:
    """Downloads a remote index once and returns the local file.

    The local name holds the object's size and tag, so a changed object is fetched again; the file appears
    atomically, so processes of one node may fetch at the same time.
    """
    fs, key = filesystem(url)
    try:
        info = fs.info(key)
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    tag = str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or "")
    name = hashlib.sha256(f"{url}\n{info.get('size')}\n{tag}".encode()).hexdigest()[:32]
    folder = cache_path or _own_folder(os.path.join(tempfile.gettempdir(), f"megatron_samoe_index_{os.getuid()}"))
    os.makedirs(folder, exist_ok=True)
    local = os.path.join(folder, f"{name}.idx")
    if not os.path.exists(local):
        with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as partial:
            fs.get_file(key, f"{partial}/idx")
            os.replace(f"{partial}/idx", local)
    return local


def _own_folder(path: str) -> str:
    """Returns a folder whose name others can guess, made if missing; DataError where others could put files into it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise DataError(
            f"{path} is not a folder of this user's that nobody else can write to, so no index is read from it: remove it, "
            "or give --data-cache-path."
        )
    return path


def open_bin(path: str, use_mmap: bool) -> BinReader:
    """Returns the reader for a .bin path or URL."""
    if is_remote(path):
        return RemoteBinReader(path)
    return MMapBinReader(path) if use_mmap else FileBinReader(path)
