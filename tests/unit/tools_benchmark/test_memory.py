"""tools/benchmarks/memory.py: the program that reads memory reads all of it."""

from __future__ import annotations

import numpy as np

from tools.benchmarks.memory import reader


def test_every_word_is_read_once_per_way() -> None:
    read = reader()
    words = np.zeros(8 * (4 * 3 * 5 + 1), np.uint64)
    start = -words.ctypes.data // 8 % 8  # the program reads lines
    lines = words[start : start + 8 * 4 * 3 * 5]
    for asks in (0, 1):
        for num_threads in (1, 3):
            for place in range(len(lines)):
                lines[place] = 1 << place % 64
                assert read(lines.ctypes.data, lines.nbytes, num_threads, asks) == 1 << place % 64
                lines[place] = 0
