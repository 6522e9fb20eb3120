"""How fast this machine's memory can be read: by a program that does nothing else, and by functions of torch."""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import tempfile
from functools import partial
from pathlib import Path

import torch

from megatron_samoe import children
from tools.benchmarks.harness import Variants, seconds_of

SOURCE = Path(__file__).with_name("read_memory.cpp")
FLAGS = ["-O3", "-march=native", "-pthread", "-shared", "-fPIC"]


def reader() -> ctypes._NamedFuncPointer:
    """Returns `read_memory` of read_memory.cpp, compiled for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_memory.so"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        children.run([*compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True)
        read = ctypes.CDLL(str(library)).read_memory
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    read.restype = ctypes.c_uint64
    return read


class Memory:
    """Reading a buffer far larger than the caches, on huge pages where Linux has them, in each of several ways.

    Args:
        num_threads: that read.
    """

    def __init__(self, num_threads: int, num_bytes: int = 1 << 30) -> None:
        memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # reading is up to a tenth faster: a floor must not flatter
        x = torch.frombuffer(memory, dtype=torch.float32).view(-1, 1 << 13).fill_(1.0)
        self._num_bytes, vector, read = x.nbytes, torch.ones(1 << 13), reader()
        self._buffer = x
        self._reads: Variants = {
            "streams": partial(read, x.data_ptr(), x.nbytes, num_threads, 0),
            "one stream": partial(read, x.data_ptr(), x.nbytes, num_threads, 1),
            "pages in turn": partial(read, x.data_ptr(), x.nbytes, num_threads, 2),
            "sum": x.sum,
            "max": x.max,
            "matrix-vector": partial(torch.mv, x, vector),
        }

    def read(self) -> float:
        """Reads once in each way; returns bytes/s of the fastest."""
        return self._num_bytes / min(seconds_of(read) for read in self._reads.values())
