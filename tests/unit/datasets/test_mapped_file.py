"""A file that is cut short under a reader is an error that names it, not the end of the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.datasets.blended_dataset import BlendedDataset, blend_indices
from megatron_samoe.datasets.gpt_dataset import GPTDataset, SampleFormat
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.mapped_file import MappedFile, require_whole
from megatron_samoe.errors import DataError
from tests.harness.datasets import write_dataset
from tests.harness.extension_off import without_extension

FORMAT = SampleFormat(seq_length=64, eod=0, vocab_size=1000)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A dataset of some pages: what is left of a page that a cut ends in can still be read."""
    return write_dataset(tmp_path / "d", [np.arange(10) + 1] * 4000)


def samples(prefix: str, cache: Path) -> GPTDataset:
    data = IndexedDataset(prefix)
    return GPTDataset(data, 0, len(data), 2000, 1, FORMAT, str(cache))


def blended(prefix: str, cache: Path) -> BlendedDataset:
    parts = [samples(prefix, cache / "parts") for _ in range(2)]
    return BlendedDataset(parts, blend_indices([1.0, 1.0], None, 4000, str(cache)))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("victim", ["d.bin", "d.idx", "cache/*.index"])
def test_samples_of_a_file_that_was_cut(
    prefix: str, tmp_path: Path, victim: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        without_extension(monkeypatch)
    data = samples(prefix, tmp_path / "cache")
    data.get_batch(range(4))
    (path,) = tmp_path.glob(victim)
    os.truncate(path, 4096)
    with pytest.raises(
        DataError, match=rf"{path.name} was cut short while it was in use: it had \d+ bytes .* has 4096"
    ):
        data.get_batch(range(2000))


READS: dict[str, Callable[[IndexedDataset], object]] = {
    "one": lambda data: data[3999],
    "part": lambda data: data.get(3999, 2, 3),
    "several": lambda data: data[3990:],
    "document": lambda data: data.document(3999),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("mmap", [True, False])
def test_sequences_of_a_file_that_was_cut(prefix: str, read: str, suffix: str, mmap: bool) -> None:
    data = IndexedDataset(prefix, mmap=mmap)
    READS[read](data)
    os.truncate(prefix + suffix, 100)
    said = "was cut short" if mmap or suffix == ".idx" else "ended at byte .*: it was truncated while in use"
    with pytest.raises(DataError, match=f"d{suffix} {said}"):
        READS[read](data)


def test_a_blend_whose_order_was_cut(prefix: str, tmp_path: Path) -> None:
    data = blended(prefix, tmp_path / "cache")
    data.get_batch([0, 1])
    (path,) = (tmp_path / "cache").glob("*.index")
    os.truncate(path, 4096)
    for read in (data.get_batch, lambda indices: data[indices[0]]):
        with pytest.raises(DataError, match="was cut short"):
            read([3999])


def test_a_file_that_grows_or_goes_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with path.open("rb") as file:
        array = np.frombuffer(MappedFile.of(file, "file"), np.uint8)[10:].view(np.uint16).reshape(3, -1)
    with path.open("ab") as file:
        file.write(bytes(10))
    require_whole(array, np.zeros(3), np.zeros(3)[1:])
    path.unlink()
    require_whole(array)
