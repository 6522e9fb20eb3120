"""How fast this machine's memory can be read: by a program that does nothing else, and by functions of torch."""

from __future__ import annotations

import ctypes
import os
import shlex
import tempfile
from functools import partial
from pathlib import Path

import torch

from megatron_samoe import children
from megatron_samoe.inference.weight_memory import ask_for_huge_pages
from tools.benchmarks.harness import Times, Variants, medians_of, seconds_of

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
    """Reading a buffer far larger than the caches, on huge pages as the engine's weights are, in each of several ways.

    Args:
        num_threads: that read.
    """

    def __init__(self, num_threads: int, num_bytes: int = 1 << 30) -> None:
        x = torch.ones(num_bytes >> 15, 1 << 13)
        ask_for_huge_pages([x])
        self._num_bytes, vector, read = x.nbytes, torch.ones(1 << 13), reader()
        self._buffer = x
        self._reads: Variants = {
            "streams": partial(read, x.data_ptr(), x.nbytes, num_threads, 0),
            "one stream": partial(read, x.data_ptr(), x.nbytes, num_threads, 1),
            "sum": x.sum,
            "max": x.max,
            "matrix-vector": partial(torch.mv, x, vector),
        }
        self._times: Times = {name: [] for name in self._reads}

    def read(self) -> None:
        """Reads once in each way."""
        for name, read in self._reads.items():
            self._times[name].append(seconds_of(read))

    def bandwidths(self) -> dict[str, float]:
        """Returns bytes/s of each way."""
        return {name: self._num_bytes / seconds for name, seconds in medians_of(self._times).items()}

    def bandwidth(self) -> float:
        """Returns bytes/s of the fastest way."""
        return max(self.bandwidths().values())
