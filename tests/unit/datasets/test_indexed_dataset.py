"""The indexed format: damaged files, readers, and files that are cut short under them, which is an error and not the end of the process."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.datasets import index_format
from megatron_samoe.datasets.blended_dataset import BlendedDataset, blend_indices
from megatron_samoe.datasets.gpt_dataset import GPTDataset, SampleFormat
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_samoe.datasets.mapped_file import MappedFile, require_whole
from megatron_samoe.errors import DataError
from tests.harness.datasets import write_dataset
from tests.harness.extension_off import without_extension


@pytest.mark.parametrize("mmap", [True, False])
def test_parts_and_limits(tmp_path: Path, mmap: bool) -> None:
    data = IndexedDataset(write_dataset(tmp_path / "d", [[1, 2, 3], [], [4, 5]]), mmap=mmap)
    data.verify()
    assert [data.document(i).tolist() for i in range(data.num_documents)] == [[1, 2, 3], [], [4, 5]]
    assert [row.tolist() for row in data[:]] == [[1, 2, 3], [4, 5]]
    assert data.get(0, 1).tolist() == [2, 3] and data.get(1, 0, 1).tolist() == [4] and data[-1].tolist() == [4, 5]
    for index, offset, length in ((2, 0, None), (-3, 0, None), (0, 4, None), (0, 1, 3), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(IndexError):
            data.get(index, offset, length)
    assert pickle.loads(pickle.dumps(data))[1].tolist() == [4, 5]


@pytest.mark.parametrize("dtype, value", [(np.uint16, 65536), (np.uint16, -1), (np.int32, 2**31), (np.uint8, 256)])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, dtype: type, value: int) -> None:
    with pytest.raises(DataError, match="does not fit"):
        IndexedDatasetBuilder(tmp_path / "d.bin", dtype).add_item([value])


def test_builder_refuses_nonsense(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be stored"):
        IndexedDatasetBuilder(tmp_path / "d.bin", np.complex64)
    builder = IndexedDatasetBuilder(tmp_path / "d.bin", np.uint16)
    with pytest.raises(DataError, match="add up to 3"):
        builder.add_document([1, 2], [3])
    with pytest.raises(DataError, match="must be integers"):
        builder.add_item([0.5])
    assert not (tmp_path / "d.bin").exists(), "an unfinished dataset must not appear"


def test_dtype_threshold_is_megatrons() -> None:
    assert index_format.optimal_dtype(65499) == np.uint16
    assert index_format.optimal_dtype(65500) == np.int32
    assert index_format.optimal_dtype(None) == np.int32


def _head(count: int = 1, boundaries: int = 2, code: int = 8, magic: bytes = b"MMIDIDX\0\0", version: int = 1) -> bytes:
    return magic + struct.pack("<QBQQ", version, code, count, boundaries)


@pytest.mark.parametrize(
    "index, message",
    [
        (b"", "is not a dataset index"),
        (b"MMIDIDX\0\0", "34"),
        (_head(magic=b"TNTIDX\0\0\0") + bytes(28), "starts with"),
        (_head(version=2) + bytes(28), "version 2"),
        (_head(code=77) + bytes(28), "dtype code 77"),
        (_head() + bytes(12), "truncated"),
        (_head() + bytes(99), "too long"),
        (_head(count=2**63, boundaries=2**62) + bytes(28), "truncated"),
        (_head(count=0, boundaries=0), "no document boundary"),
        (_head() + struct.pack("<iqqq", 2, 0, 0, 5), "boundaries run from"),
        (_head() + struct.pack("<iqqq", -1, 0, 0, 1), "claims -1 tokens"),
        (_head() + struct.pack("<iqqq", 2, 2, 0, 1), "outside the 4 bytes"),
        (_head() + struct.pack("<iqqq", 2, 2**63 - 1, 0, 1), "outside the 4 bytes"),
        (_head() + struct.pack("<iqqq", 2, -4, 0, 1), "outside the 4 bytes"),
        (_head(boundaries=3) + struct.pack("<iqqqq", 2, 0, 0, 2, 1), "is before the one"),
    ],
)
def test_damaged_indices(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "d.bin").write_bytes(bytes(4))
    (tmp_path / "d.idx").write_bytes(index)
    with pytest.raises(DataError, match=message):
        IndexedDataset(str(tmp_path / "d"))


def test_missing_datasets_name_the_nearest(tmp_path: Path) -> None:
    write_dataset(tmp_path / "wiki_text_document", [[1]])
    with pytest.raises(DataError, match="wiki_text_document"):
        IndexedDataset(str(tmp_path / "wikki_text_document"))
    with pytest.raises(DataError, match="Leave out the suffix"):
        IndexedDataset(str(tmp_path / "wiki_text_document.bin"))
    with pytest.raises(DataError, match="is not a folder"):
        IndexedDataset(str(tmp_path / "none" / "x"))
    (tmp_path / "wiki_text_document.idx").unlink()
    with pytest.raises(DataError, match="repair"):
        IndexedDataset(str(tmp_path / "wiki_text_document"))


def test_index_of_many_rows_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.arange(1, 100, dtype=np.int32)
    index_format.write_index(tmp_path / "whole.idx", np.uint16, lengths, np.arange(100))
    monkeypatch.setattr(index_format, "CHUNK_ROWS", 7)
    index_format.write_index(tmp_path / "pieces.idx", np.uint16, lengths, np.arange(100))
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "pieces.idx").read_bytes()
    (tmp_path / "pieces.bin").write_bytes(bytes(2 * int(lengths.sum())))
    IndexedDataset(str(tmp_path / "pieces")).verify()


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
    with pytest.raises(DataError, match=rf"{path.name} was cut short .* has 4096"):
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
