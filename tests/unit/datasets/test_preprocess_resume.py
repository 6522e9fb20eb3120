"""The preprocessor ended at any point, by a full disk too, and gone on with: the same bytes, and nothing of others overwritten."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.cli.preprocess import main
from megatron_samoe.datasets.preprocess import journal, run
from megatron_samoe.datasets.preprocess.executors import InlineExecutor
from megatron_samoe.errors import DataError
from tests.harness.datasets import content, jsonl, kill_9, options, seconds_of
from tests.harness.program import flip_bit
from tests.unit.datasets.test_preprocess import TEXTS

#: Kills of the preprocessor by signal.
NUM_KILLS = 8


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("out*")}


class _StopAfter(InlineExecutor):
    """Fails after a number of messages, as a killed run would."""

    left = 0

    def send(self, worker: int, message: tuple) -> None:
        type(self).left -= 1
        if type(self).left < 0:
            raise KeyboardInterrupt
        super().send(worker, message)


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_resuming_at_every_point_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deduplicate: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time
    (tmp_path / "in.jsonl").write_bytes(jsonl([f"{n} {text}" for n, text in enumerate(TEXTS * 4)] + TEXTS) + b"bad\n")
    wanted_options = options(tmp_path, "in.jsonl", on_bad_input="skip", deduplicate=deduplicate)
    run.preprocess(wanted_options)
    wanted = outputs(tmp_path)
    monkeypatch.setattr(run, "make_executor", _StopAfter)
    for stop in range(0, 40, 3):
        for path in tmp_path.glob("out*"):
            path.unlink()
        _StopAfter.left = stop
        for _ in range(50):
            try:
                run.preprocess(replace(wanted_options, resume=True))
                break
            except KeyboardInterrupt:
                _StopAfter.left = stop + 4
        assert outputs(tmp_path) == wanted


def test_resume_detects_lost_bytes_and_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS * 8))
    run.preprocess(options(tmp_path, "in.jsonl"))
    wanted = outputs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run, "make_executor", _StopAfter)
        _StopAfter.left = 15
        with pytest.raises(KeyboardInterrupt):
            run.preprocess(options(tmp_path, "in.jsonl"))
    flip_bit(tmp_path / "out_text_document.bin.partial")
    with pytest.raises(DataError, match="other options"):
        run.preprocess(options(tmp_path, "in.jsonl", resume=True, append_eod=True))
    with open(tmp_path / "out.preprocess.journal", "a") as file:
        file.write('{"chunk": 99, "torn')
    run.preprocess(options(tmp_path, "in.jsonl", resume=True))
    assert outputs(tmp_path) == wanted


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS))
    held = journal.Journal(str(tmp_path / "out.preprocess.journal"))
    with pytest.raises(DataError, match="Another run"):
        run.preprocess(options(tmp_path, "in.jsonl"))
    held.close(remove=True)


def _command(folder: Path, *more: str) -> list[str]:
    """Returns the command line of two workers on a corpus of many chunks, which it writes."""
    (folder / "in.jsonl").write_bytes(jsonl(f"{n} {'text ' * 60}" for n in range(12_000)))
    words = f"--input {folder}/in.jsonl --output-prefix {folder}/out --tokenizer-type ByteTokenizer --quiet --workers 2"
    tool = Path(__file__).resolve().parents[3] / "tools/preprocess_data.py"
    return [sys.executable, str(tool), *words.split(), "--chunk-kb", "16", "--overwrite", *more]


@pytest.mark.night
def test_kill_9_at_random_points_then_resume(tmp_path: Path) -> None:
    whole_s, wanted = seconds_of(_command(tmp_path)), outputs(tmp_path)
    random, killed, done = np.random.default_rng(int(time.time())), 0, True
    while killed < NUM_KILLS or not done:
        if done:
            for path in tmp_path.glob("out*"):
                path.unlink()
        done = not kill_9(_command(tmp_path, "--resume"), float(random.uniform(0.2, 0.2 + whole_s)))
        killed += not done
        assert not done or outputs(tmp_path) == wanted


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    seconds_of(_command(tmp_path))
    wanted = outputs(tmp_path)
    process = subprocess.Popen(_command(tmp_path), stdout=subprocess.DEVNULL)
    while not (tmp_path / "out_text_document.bin.partial").exists():
        time.sleep(0.005)
    os.kill(_children(process.pid)[0], signal.SIGKILL)
    assert process.wait(timeout=60) == 0 and outputs(tmp_path) == wanted


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
