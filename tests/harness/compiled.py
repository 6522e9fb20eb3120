"""What tests compile, once for all workers and runs: kept in build/compiled by a digest of what it is made from."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "compiled"


@functools.cache
def _common() -> str:
    """Returns a digest of the compiler, torch, and all sources, of which a command may include any."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(compiler + torch.__version__.encode())
    for path in sorted((ROOT / "cpp_ext").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_one(command: Sequence[str]) -> str:
    """Runs a compiler's command, `... -o FILE ...`, or takes what it has made before; returns its warnings.

    Raises:
        AssertionError: the command fails; with all that it said.
    """
    target = command[command.index("-o") + 1]
    digest = hashlib.sha256(_common().encode())
    for word in command:
        is_made = os.path.isfile(word) and ROOT not in Path(word).resolve().parents
        digest.update(b"\0" + (Path(word).read_bytes() if is_made else b"" if word == target else word.encode()))
    kept = KEPT / digest.hexdigest()
    said = kept.with_suffix(".said")
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
            said.write_text(result.stderr)
            os.replace(shutil.copy(target, kept.with_suffix(".part")), kept)
    shutil.copy(kept, target)
    return said.read_text()


def compile_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Returns what each of several commands said, run side by side."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, commands))
