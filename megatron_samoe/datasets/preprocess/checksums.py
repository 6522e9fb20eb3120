"""CRC-32 of files, and of a concatenation from the CRCs of its parts."""

from __future__ import annotations

import functools
import os
import zlib

_POLYNOMIAL = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """Returns a * b modulo the CRC polynomial, bits reflected (the highest bit is x^0)."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@functools.lru_cache(maxsize=4096)
def _power(num_bytes: int) -> int:
    """Returns x^(8 * num_bytes) modulo the polynomial."""
    result, square = 0x80000000, 0x00800000  # 1 and x^8
    while num_bytes:
        if num_bytes & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        num_bytes >>= 1
    return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """Returns the CRC-32 of two pieces joined, from the CRC of each and the length of the second."""
    return _multiply(first, _power(second_bytes)) ^ second


def file_crc32(path: str, start: int = 0, num_bytes: int | None = None) -> int:
    """Returns the CRC-32 of a file, or of a part of it (up to its end if it is shorter)."""
    crc, left = 0, os.path.getsize(path) if num_bytes is None else num_bytes
    with open(path, "rb") as file:
        file.seek(start)
        while left and (block := file.read(min(1 << 20, left))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
    return crc
