"""A cache of sample indices, keyed by the content they were built from, safe on shared and node-local disks.

One file holds the arrays of one index: a line with their number and key, then each as numpy saves it. Its name is a hash of
everything that decides them: the lengths of the sequences themselves rather than the path of the dataset, so a dataset that
changed under its path, or moved, can never get a stale index. A file appears atomically; a damaged one is rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np

from megatron_samoe.datasets.mapped_file import MappedFile
from megatron_samoe.log import say_once
from megatron_samoe.parsing import JsonObject

# Of an array's header, so that its values are aligned as well.
_ALIGN = 64
STALE_AFTER_S = 6 * 3600


Arrays = tuple[np.ndarray, ...]


def content_key(array: np.ndarray) -> str:
    """Returns a hash of an array's shape, dtype and bytes (about 1 GB/s)."""
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(flat), 1 << 24):
        digest.update(flat[start : start + (1 << 24)].data)
    return digest.hexdigest()


def load_or_build(folder: str | None, key: JsonObject, build: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays for `key`: mapped from the cache, or built (and stored there when `folder` is given).

    A folder that cannot be written is not an error: the arrays then stay in memory, and one line says so.
    """
    if folder is None:
        return build()
    text = json.dumps(key, sort_keys=True)
    path = os.path.join(folder, hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + ".index")
    arrays = _load(path, text)
    if arrays is not None:
        return arrays
    arrays = build()
    try:
        os.makedirs(folder, exist_ok=True)
        _store(folder, path, text, arrays)
    except OSError as error:
        say_once(f"Sample indices are kept in memory: {folder} cannot be written ({error.strerror or error}).")
        return arrays
    return _load(path, text) or arrays


def _remove_stale(folder: str) -> None:
    """Removes what killed processes left half written; younger files may be another rank's work."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            if name.endswith(".partial") and time.time() - os.path.getmtime(path) > STALE_AFTER_S:
                os.unlink(path)


def _store(folder: str, path: str, key: str, arrays: Arrays) -> None:
    _remove_stale(folder)
    handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(f"{len(arrays)} {key}\n".encode())
            for array in arrays:
                file.write(bytes(-file.tell() % _ALIGN))
                np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _load(path: str, key: str) -> Arrays | None:
    """Returns the mapped arrays, or None without a complete file for `key`."""
    arrays: list[np.ndarray] = []
    try:
        with open(path, "rb") as file:
            line = file.readline(len(key) + 20).decode()
            count, _, found = line.partition(" ")
            if found != f"{key}\n":
                return None
            mapped, end = MappedFile.of(file, path), len(line)
            for _ in range(int(count)):
                file.seek(-(-end // _ALIGN) * _ALIGN)
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                arrays.append(np.frombuffer(mapped, dtype, math.prod(shape), file.tell()).reshape(shape))
                end = file.seek(arrays[-1].nbytes, os.SEEK_CUR)
            return tuple(arrays) if end == len(mapped) else None
    except Exception:  # numpy raises several kinds for a damaged header
        return None
