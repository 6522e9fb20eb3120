"""Hostile files end in a sentence or are read: a few by day, ten minutes of them at night. And what is planted is found."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.errors import DataError
from tests.harness.datasets import options
from tests.hostile.__main__ import search
from tests.hostile.formats import MAKERS, VICTIMS, Case
from tests.hostile.trial import REACHED, Trials, fault_of, run

#: Changes that make much to read.
LARGE = re.compile("MB|million|thousand|bomb|a long text|what no value is")


def is_small(case: Case) -> bool:
    """Whether a case is tried in less than a second."""
    return not LARGE.search(case.drawn[1]) and "process" not in case.drawn[2].split()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("hostile"))


def test_hostile_files_by_day(trials: Trials) -> None:
    assert search(trials, 2, 1, is_small, most=16) == []


@pytest.mark.night
def test_hostile_files_at_night(trials: Trials) -> None:
    """SAMOE_HOSTILE_SEED draws other ones."""
    assert search(trials, 10, int(os.environ.get("SAMOE_HOSTILE_SEED", "1"))) == []


@pytest.mark.parametrize(
    "kind", [kind if kind == "yaml" else pytest.param(kind, marks=pytest.mark.night) for kind in MAKERS]
)
def test_sound_files_are_read(kind: str, trials: Trials, tmp_path: Path) -> None:
    """Else a refusal would say nothing about what was changed."""
    sound = trials.sound(kind)
    commands = {
        words.replace("{file}", f"{{in}}/{v.glob}") for v in VICTIMS if v.format == kind for words in v.commands
    }
    for number, words in enumerate(sorted(commands)):
        place = tmp_path / str(number)
        shutil.copytree(sound, place / "in")
        (place / "out").mkdir()
        end = trials.try_command(words, place, place)
        assert not fault_of(end, (), place / "CANARY") and "error" not in end.output, f"{words}\n{end.output}"


def run_code() -> None:
    exec("open('CANARY', 'w')")


def write_above() -> None:
    Path("../outside").touch()
    open("../outside", "w").close()


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (run_code, "runs code of the file"),
        (write_above, REACHED + "open"),
        (os.abort, "dies by SIGABRT"),
        (os.getpid, "ends with status"),
    ],
)
def test_what_a_command_must_not_do_is_seen(function: Callable[[], None], fault: str, tmp_path: Path) -> None:
    end = run(tmp_path, function)
    assert fault_of(end, ("file",), tmp_path / "CANARY").startswith(fault), end


def read_long_line(path: Path) -> None:
    with pytest.raises(DataError, match="The corpus is empty"):
        preprocess(
            options(path.parent, path.name, chunk_bytes=1 << 20, max_document_bytes=1 << 20, on_bad_input="skip")
        )


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_decompression_bomb_is_a_long_line_and_no_more(suffix: str, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = b'{"text": "' + b"a" * (64 << 20) + b'"}\n'
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(gzip.compress(bomb, 1) if suffix == ".gz" else zstandard.ZstdCompressor().compress(bomb))
    end = run(tmp_path, read_long_line, path)
    assert end.status == 0 and end.growth_mb < 300, end
