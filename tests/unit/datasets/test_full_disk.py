"""Preprocessing onto a disk that fills up: what to do is said, and --resume ends as if there had been room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_samoe.cli.preprocess import main
from tests.harness.datasets import content

SMALL_BYTES = 128 << 10


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yields a folder with little room, and what gives it more: a file system, or where none can be mounted a limit of our own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True) and None
        subprocess.run(["umount", "-l", str(disk)], check=True)
        return
    real = os.pwrite

    def limited(file: int, data: memoryview, offset: int) -> int:
        if offset + len(data) > SMALL_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        yield disk, patch.undo


def words(text: Path, output: Path, *more: str) -> list[str]:
    separate = ["--document-separator", "blank-line", "--append-eod", "--tokenizer-type", "ByteTokenizer"]
    how = ["--executor", "inline", "--chunk-kb", "8", "--quiet"]
    return ["--input", str(text), "--output-prefix", str(output), *separate, *how, *more]


def test_a_full_disk_names_resume_which_then_goes_on(
    small_disk: tuple[Path, Callable[[], None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, make_room = small_disk
    text = tmp_path / "novel.txt"
    text.write_text("".join(f"Chapter {number}\n{'It was a fine day. ' * 40}\n\n" for number in range(300)))
    assert main(words(text, disk / "out")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: The output cannot be written to {disk}: No space left on device. Make room, and")
    assert "--resume" in said and "Traceback" not in said
    make_room()
    done_before = (disk / "out_text_document.bin.partial").stat().st_size
    assert done_before > 0 and not (disk / "out_text_document.bin").exists()
    assert main(words(text, disk / "out", "--resume")) == 0
    assert main(words(text, tmp_path / "whole")) == 0
    assert content(disk / "out_text_document") == content(tmp_path / "whole_text_document")
    assert not list(disk.glob("*partial")) + list(disk.glob("*journal"))
