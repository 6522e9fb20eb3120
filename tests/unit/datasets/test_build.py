"""From a configuration to datasets: errors at the start, caches, samplers, the loader, resumption and reads ahead."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets import blends, index_cache, manifest, sample_index
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.loader import DataLoader
from megatron_samoe.datasets.samplers import PretrainingRandomSampler, PretrainingSampler
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.errors import DataError
from tests.harness.datasets import preprocessed, random_dataset, write_dataset
from tests.harness.extension_off import without_extension
from tests.harness.tables import table

TABLE = table(__file__)

BYTES = ByteTokenizer()


def build(data: DataConfig, num_samples: tuple = (10, 0, 0), seq_length: int = 16, **more):  # type: ignore
    return build_train_valid_test_datasets(data, num_samples, seq_length, 1234, BYTES, **more)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return random_dataset(tmp_path / "a_text_document", [50] * 40)


def test_splits_are_disjoint_and_only_what_is_needed_is_built(prefix: str) -> None:
    train, valid, test = build(DataConfig(data_path=(prefix,), split="80,10,10"), (None, None, 0))
    assert test is None
    first, second = set(train.document_index.tolist()), set(valid.document_index.tolist())
    assert first == set(range(32)) and second == set(range(32, 36))


@pytest.mark.parametrize("way", ["compiled", "plain", "from files"])
def test_samples_are_stacked_alike(way: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = random_dataset(tmp_path / "b", [33] * 30)
    data = DataConfig(data_path=("1", prefix, "2", other), split="1", eod_mask_loss=True, reset_attention_mask=True)
    train, _, _ = build(data, (30, 0, 0))
    expected = [train[index] for index in range(30)]
    if way == "plain":
        without_extension(monkeypatch)
    read = build(replace(data, no_mmap_bin_files=way == "from files"), (30, 0, 0))[0]
    batch = pickle.loads(pickle.dumps(read)).get_batch(range(30))
    for index, sample in enumerate(expected):
        for key, value in sample.items():
            assert torch.equal(batch[key][index], value) and batch[key].shape == (30, 16)
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def refused(message: str, data: DataConfig, *args: object) -> None:
    with pytest.raises(DataError) as caught:
        build(data, *args)  # type: ignore[arg-type]
    assert message in str(caught.value), caught.value


def test_data_that_cannot_be_used_are_refused_at_the_start(prefix: str, tmp_path: Path) -> None:
    for message, values, *more in table(__file__)["refused"]:
        paths = {name: tuple(word.format(prefix=prefix) for word in values[name]) for name in values if "path" in name}
        refused(message, DataConfig(**values | paths), *more)
    large = write_dataset(tmp_path / "large", [np.arange(900)])
    refused("token id 899, outside the vocabulary of 257", DataConfig(data_path=(large,), split="1"))
    refused("--vocab-size of 900 or more", DataConfig(data_path=(large,), split="1"))


def test_an_id_out_of_range_found_only_when_read(prefix: str) -> None:
    train = build(DataConfig(data_path=(prefix,), split="1"))[0]
    object.__setattr__(train.format, "vocab_size", 3)
    with pytest.raises(DataError, match="another tokenizer"):
        train[0]
    with pytest.raises(IndexError):
        train[len(train)]


def test_tokenizers_are_told_apart_by_the_manifest(tmp_path: Path) -> None:
    first, second = (preprocessed(tmp_path, name, ["a fine day " * 200]) for name in "ab")
    build(DataConfig(data_path=(first, second), split="1"), (None, 0, 0))
    record = manifest.read(second)
    assert record is not None
    other = replace(record, tokenizer_fingerprint="f" * 64, tokenizer_type="HuggingFaceTokenizer", vocab_size=8192)
    manifest.write(second, other)
    for part in ("HuggingFaceTokenizer, 8192 entries", "this run (257 entries", "or make a dataset of the text with"):
        refused(part, DataConfig(data_path=(second,), split="1"))
    for part in ("different tokenizers", f"{first} (", f"{second} (", "Make them anew with one"):
        refused(part, DataConfig(data_path=("1", first, "1", second), split="1"))
    path = Path(manifest.get_manifest_path(second))
    for content, said in (
        ("{", "is not a manifest"),
        (replace(record, format_version=2).to_json(), "has format version 2; this program reads 1"),
        (replace(record, num_tokens=True).to_json(), "its num_tokens is True"),
        (replace(record, inputs=[7]).to_json(), "its inputs or counts hold something else"),  # type: ignore[list-item]
    ):
        path.write_text(content)
        refused(said, DataConfig(data_path=(second,), split="1"))


def test_blend_files(prefix: str, tmp_path: Path) -> None:
    name = os.path.basename(prefix)
    path = tmp_path / "blend.yaml"
    path.write_text(f"- {{path: {name}, weight: 3}}\n- {{path: {prefix}, weight: 1}}\n")
    train, valid, _ = build(DataConfig(data_path=(str(path),), split="50,50"), (40, 20, 0))
    assert np.bincount(train.dataset_index).tolist() == [30, 10] and len(valid) == 20
    path.write_text(f"train: [{name}]\nvalid: [{name}, {prefix}]\n")
    train, valid, _ = build(DataConfig(data_path=(str(path),)), (10, None, 0))
    assert len(valid) == 2 * 124
    for text, message in TABLE["wrong blends"]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            blends.parse_blend([str(path)])


def test_the_cache_is_keyed_by_content(tmp_path: Path) -> None:
    data = DataConfig(
        data_path=(random_dataset(tmp_path / "d", [50] * 40),), split="1", data_cache_path=str(tmp_path / "cache")
    )
    first = build(data)[0]
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and isinstance(first.document_index.base, np.ndarray)
    again = build(data)[0]
    np.testing.assert_array_equal(first.sample_index, again.sample_index)
    assert list((tmp_path / "cache").iterdir()) == files
    moved = DataConfig(
        data_path=(random_dataset(tmp_path / "moved", [50] * 40, seed=5),),
        split="1",
        data_cache_path=data.data_cache_path,
    )
    build(moved)
    assert list((tmp_path / "cache").iterdir()) == files, "the same lengths have the same index wherever they lie"
    random_dataset(tmp_path / "d", [40] * 50)
    changed = build(data)[0]
    assert changed.document_index.max() == 49, "a dataset that changed under its path is not met by an old index"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5], lambda b: b[:40], lambda b: b"x" + b[1:], lambda b: b"", lambda b: b + b"x"]
)
def test_a_damaged_cache_is_rebuilt(prefix: str, tmp_path: Path, damage) -> None:  # type: ignore
    data = DataConfig(data_path=(prefix,), split="1", data_cache_path=str(tmp_path / "cache"))
    wanted = build(data)[0].sample_index.copy()
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    np.testing.assert_array_equal(build(data)[0].sample_index, wanted)
    assert file.read_bytes() == content


@pytest.mark.parametrize("step", ["numpy.save", "os.fsync", "os.replace"])
def test_a_store_that_is_killed_leaves_no_index(
    step: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has begun stays, since a killed process removes nothing, until a later one finds it old."""
    cache = tmp_path / "cache"
    data = DataConfig(data_path=(prefix,), split="1", data_cache_path=str(cache))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", lambda path: None)
        patch.setattr(step, Mock(side_effect=KeyboardInterrupt))
        build(data)
    (left,) = cache.iterdir()
    assert left.suffix == ".partial"
    fresh = build(DataConfig(data_path=(prefix,), split="1", data_cache_path=str(tmp_path / "other")))[0]
    np.testing.assert_array_equal(build(data)[0].sample_index, fresh.sample_index)
    assert left.exists(), "it may be another rank's work"
    os.utime(left, (0, 0))
    build(data, (60, 0, 0))
    assert [path.suffix for path in cache.iterdir()] == [".index"] * 2


def test_a_cache_that_cannot_be_written_is_no_error(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = DataConfig(data_path=(prefix,), split="1", data_cache_path=str(tmp_path / "file"))
    assert len(build(data)[0]) >= 10
    arrays = index_cache.load_or_build("/proc/none", {"a": 1}, lambda: (np.arange(3),))
    assert arrays[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shared", [True, False])
def test_indices_are_built_once_a_cache(
    prefix: str, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks as threads, on one cache or on a disk of their own."""
    barrier, built, stored = threading.Barrier(4), {}, []
    store = index_cache._store
    monkeypatch.setattr(index_cache, "_store", lambda *args: (stored.append(args[1]), store(*args)))

    def rank(number: int) -> None:
        folder = tmp_path / ("cache" if shared else f"cache{number}")
        data = DataConfig(data_path=(prefix,), split="1", data_cache_path=str(folder))
        turn = (0, 1, 1, 2 if shared else 1)[number]
        built[number] = build(data, barrier=barrier.wait, turn=turn)[0][5]["tokens"]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(built) == 4 and all(torch.equal(built[0], tokens) for tokens in built.values())
    assert len(stored) == len(set(stored)) == (1 if shared else 4)


def test_an_error_of_the_builder_lets_the_others_go() -> None:
    calls = []
    for turn in (0, 1, 2):
        with pytest.raises(DataError):
            build(DataConfig(data_path=("/nowhere/x",)), barrier=lambda: calls.append(1), turn=turn)
    assert len(calls) == 6


def test_mock_data_need_no_files() -> None:
    train, valid, test = build(DataConfig(mock_data=True), (5, 2, 0))
    assert len(train) == 5 and test is None
    assert torch.equal(train[3]["tokens"], build(DataConfig(mock_data=True), (5, 2, 0))[0][3]["tokens"])
    assert not torch.equal(train[1]["tokens"], valid[1]["tokens"])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_loader_keeps_the_order_and_draws_nothing(prefix: str, workers: int) -> None:
    train = build(DataConfig(data_path=(prefix,), split="1"), (100, 0, 0))[0]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches = list(DataLoader(train, PretrainingSampler(len(train), 8, 4, 0, 1), num_workers=workers))
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    wanted = train.get_batch(range(8, 8 + 4 * len(batches)))["tokens"]
    assert torch.equal(torch.cat([batch["tokens"] for batch in batches]), wanted)
    assert len(batches) == (len(train) - 8) // 4


@given(st.integers(0, 2**32 - 1), st.integers(0, 3000), st.sampled_from([np.int32, np.int64, np.uint32]))
@settings(deadline=None)
def test_compiled_shuffle_is_numpys(seed: int, count: int, dtype: type) -> None:
    ours, theirs = np.arange(count, dtype=dtype), np.arange(count, dtype=dtype)
    mine, yours = np.random.RandomState(seed), np.random.RandomState(seed)
    for _ in range(2):
        sample_index.shuffle(ours, mine)
        yours.shuffle(theirs)
        np.testing.assert_array_equal(ours, theirs)
    assert mine.randint(1 << 30) == yours.randint(1 << 30), "the generators are left in the same state"


def test_damaged_lengths_are_refused_by_both_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, documents = np.array([5, -3, 9], dtype=np.int32), np.array([0, 1, 2], dtype=np.int32)
    for compiled in (True, False):
        if not compiled:
            without_extension(monkeypatch)
        with pytest.raises(DataError, match="negative length"):
            sample_index.build_sample_index(lengths, documents, 4, 2)


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(total=st.integers(1, 200), consumed=st.integers(0, 199), sizes=SIZES)
@settings(deadline=None)
def test_single_sampler(total: int, consumed: int, sizes: tuple[int, int]) -> None:
    micro, ranks = sizes
    if consumed >= total:
        with pytest.raises(DataError, match="consumed"):
            PretrainingSampler(total, consumed, micro, 0, ranks)
        return
    samplers = [PretrainingSampler(total, consumed, micro, rank, ranks) for rank in range(ranks)]
    streams = [list(sampler) for sampler in samplers]
    assert {len(stream) for stream in streams} == {len(samplers[0])}
    read = [i for step in zip(*streams, strict=True) for part in step for i in part]
    assert read == list(range(consumed, consumed + len(read))) and total - consumed - len(read) < micro * ranks


def _take(iterator: Iterator[list[int]], count: int) -> list[int]:
    read: list[int] = []
    while len(read) < count:
        read.extend(next(iterator))
    return read[:count]


@given(total=st.integers(1, 60), consumed=st.integers(0, 150), sizes=SIZES, seed=st.integers(0, 9))
@settings(deadline=None)
def test_cyclic_sampler_does_not_depend_on_the_ranks(
    total: int, consumed: int, sizes: tuple[int, int], seed: int
) -> None:
    micro, ranks = sizes
    whole = _take(iter(PretrainingRandomSampler(total, 0, 1, 0, 1, seed)), consumed + 40)
    streams = [iter(PretrainingRandomSampler(total, consumed, micro, rank, ranks, seed)) for rank in range(ranks)]
    resumed = [i for _ in range(40 // (micro * ranks)) for stream in streams for i in next(stream)]
    assert resumed == whole[consumed : consumed + len(resumed)]


@given(total=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_each_epoch_of_a_cyclic_sampler_has_an_order_of_its_own(total: int, seed: int) -> None:
    orders = []
    for number in (seed, (seed + 1) % 2**32):
        read = _take(iter(PretrainingRandomSampler(total, 0, 3, 0, 1, number)), 3 * total)
        epochs = [tuple(read[start : start + total]) for start in range(0, 3 * total, total)]
        assert all(sorted(epoch) == list(range(total)) for epoch in epochs), "each sample once"
        orders += [tuple(range(total)), *epochs]
    assert total < 20 or len(set(orders)) == 7, "of two seeds, and of no seed"


def test_samplers_refuse_nonsense() -> None:
    for arguments in ((10, 0, 1, 2, 2), (10, 0, 0, 0, 1), (10, -1, 1, 0, 1)):
        with pytest.raises(DataError):
            PretrainingSampler(*arguments)


class _Slow:
    def __init__(self, fail_at: int = -1):
        self.reads, self.fail_at = 0, fail_at

    def get_batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        self.reads += 1
        if self.fail_at in indices:
            raise DataError("damaged")
        return {"tokens": torch.tensor(indices)}


def test_the_loader_reads_ahead_a_little_and_stops_when_left() -> None:
    slow = _Slow()
    iterator = iter(DataLoader(slow, PretrainingSampler(1000, 0, 1, 0, 1), num_workers=2))
    next(iterator)
    deadline = time.monotonic() + 20
    while slow.reads < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert slow.reads == 5, "one batch was taken, and two per thread are ready"
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert slow.reads <= 7


def test_an_error_of_a_read_comes_where_the_batch_is_due() -> None:
    iterator = iter(DataLoader(_Slow(fail_at=2), PretrainingSampler(10, 0, 1, 0, 1), num_workers=1))
    assert [int(next(iterator)["tokens"]) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="damaged"):
        next(iterator)
