"""Mutants: the package with one small wrong change each, which the tests should find."""

from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
Mutant = dict[str, Any]


def room_of(file: str) -> str:
    """Returns the package or module below `megatron_samoe` that a file is in."""
    return file.split("/")[1].removesuffix(".py")
