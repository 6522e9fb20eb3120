"""Damages bytes, for tests that nothing may crash on."""

from __future__ import annotations

import numpy as np


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Returns content with a few bytes changed, cut, repeated or replaced by extreme numbers."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        kind, at = int(random.integers(5)), int(random.integers(len(data) + 1))
        if kind == 0 and data:
            data[at % len(data)] = int(random.integers(256))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + int(random.integers(1, 9))]
        elif kind == 3:
            data[at:at] = data[: int(random.integers(1, 20))]
        else:
            extreme = random.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"\xff\xff\xff\x7f"])
            data[at : at + len(extreme)] = extreme
    return bytes(data)
