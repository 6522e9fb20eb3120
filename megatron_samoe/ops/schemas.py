"""The compiled ops as torch sees them: this table defines them, and the library's kernels (cpp_ext/bindings) join by name.

A library records the table of its sources; one with another table is not used.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

NAMESPACE = "megatron_samoe"
_TABLE = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
#: The schema of each op, by name.
SCHEMAS = {line.partition("(")[0]: line for line in _TABLE.splitlines()}


def digest() -> str:
    """Returns the fingerprint of this table, as cpp_ext/builder.py records it."""
    return hashlib.sha256(_TABLE.encode()).hexdigest()


def define() -> torch.library.Library:
    """Defines all ops; they are there as long as the result."""
    ops = torch.library.Library(NAMESPACE, "DEF")
    for schema in SCHEMAS.values():
        ops.define(schema)
    return ops
