"""The indexed format and the sample order, compared with megatron-core's own code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets import sample_index
from megatron_samoe.datasets.blends import split_bounds
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from tests.harness.datasets import write_dataset
from tests.harness.extension_off import without_extension

pytestmark = pytest.mark.parity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as TheirBuilder

RELAXED = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
VOCAB = 257


class TheirTokenizer:
    """The least that megatron-core asks of a tokenizer."""

    vocab_size, eod, pad = VOCAB, 256, -1
    unique_identifiers = {"class": "TheirTokenizer"}  # noqa: RUF012


def make_dataset(prefix: Path, document_lengths: list[int], seed: int = 0) -> str:
    """Writes a dataset of random documents that end with 256 and returns its prefix."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, 256, length) for length in document_lengths]
    for tokens in documents:
        tokens[-1:] = 256
    return write_dataset(prefix, documents)


DTYPES = st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
DOCUMENTS = st.lists(st.lists(st.integers(0, 7), max_size=4), max_size=12)


@RELAXED
@given(dtype=DTYPES, documents=DOCUMENTS, seed=st.integers(0, 99))
def test_builder_writes_the_same_bytes(tmp_path: Path, dtype: type, documents: list[list[int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    ours, theirs = IndexedDatasetBuilder(tmp_path / "o.bin", dtype), TheirBuilder(str(tmp_path / "t.bin"), dtype)
    for lengths in documents:
        tokens = random.integers(0, 100, sum(lengths)).astype(dtype)
        ours.add_document(tokens, lengths)
        theirs.add_document(tokens, lengths)
    ours.add_item(np.array([1, 2], dtype=dtype))
    ours.end_document()
    theirs.add_item(torch.tensor([1, 2]))
    theirs.end_document()
    ours.finalize(tmp_path / "o.idx")
    theirs.finalize(str(tmp_path / "t.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"o{suffix}").read_bytes() == (tmp_path / f"t{suffix}").read_bytes()
    read_ours, read_theirs = IndexedDataset(str(tmp_path / "t")), TheirDataset(str(tmp_path / "o"))
    assert len(read_ours) == len(read_theirs) and read_ours.dtype == read_theirs.index.dtype
    for number in range(len(read_ours)):
        np.testing.assert_array_equal(read_ours[number], read_theirs[number])
    np.testing.assert_array_equal(read_ours.document_indices, read_theirs.document_indices)


def test_builder_joins_datasets_as_they_do(tmp_path: Path) -> None:
    first, second = make_dataset(tmp_path / "a", [3, 0, 5], 1), make_dataset(tmp_path / "b", [2, 7], 2)
    for kind, name in ((IndexedDatasetBuilder, "o"), (TheirBuilder, "t")):
        builder = kind(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        builder.add_index(first)
        builder.add_index(second)
        builder.finalize(str(tmp_path / f"{name}.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"o{suffix}").read_bytes() == (tmp_path / f"t{suffix}").read_bytes()


@RELAXED
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), st.sampled_from([",", "/", ", "]))
def test_split_bounds(shares: list[int], separator: str) -> None:
    text = separator.join(map(str, shares))
    assert split_bounds(text) == convert_split_vector_to_split_matrix(parse_and_normalize_split(text))


def their_datasets(config: dict, sizes: list[int | None]) -> list:
    """Returns megatron-core's datasets of the three splits."""
    usual = dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"), False
    )
    length, seed = config.pop("seq_length"), config.pop("seed")
    full = {**usual, "random_seed": seed, "sequence_length": length, "tokenizer": TheirTokenizer(), **config}
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, GPTDatasetConfig(**full)).build()


def assert_same_samples(ours, theirs, at_most: int = 60) -> None:  # type: ignore[no-untyped-def]
    assert len(ours) == len(theirs)
    for index in np.linspace(0, len(ours) - 1, min(at_most, len(ours))).astype(int).tolist():
        mine, yours = ours[index], theirs[index]
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(mine[key], yours[key]), key
            assert mine[key].dtype == yours[key].dtype


@RELAXED
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    seq_length=st.integers(1, 24),
    epochs=st.floats(0.05, 4.5),
    seed=st.integers(0, 2**32 - 1),
    compiled=st.booleans(),
)
def test_one_dataset_gives_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_length: int,
    epochs: float,
    seed: int,
    compiled: bool,
) -> None:
    total = sum(lengths)
    if total < seq_length + 1:
        return
    prefix = make_dataset(tmp_path_factory.mktemp("d") / "data", lengths, seed % 97)
    count = max(1, int(epochs * total / seq_length))
    theirs = their_datasets(
        {"seed": seed, "seq_length": seq_length, "blend": ([prefix], None), "split": "1"}, [count] * 3
    )
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            without_extension(patch)
        data = DataConfig(data_path=(prefix,), split="1")
        ours = build_train_valid_test_datasets(data, (count, 0, 0), seq_length, seed, ByteTokenizer())
    mine, yours = ours[0], theirs[0]
    np.testing.assert_array_equal(mine.document_index, yours.document_index)
    np.testing.assert_array_equal(mine.sample_index, yours.sample_index)
    np.testing.assert_array_equal(mine.shuffle_index, yours.shuffle_index)
    assert mine.shuffle_index.dtype == yours.shuffle_index.dtype
    assert_same_samples(mine, yours)


@settings(RELAXED, max_examples=25)
@given(
    split=st.sampled_from(["960,30,10", "80,10,10", "50,50", "99,1,0", "7/2/1", "0.6,0.3,0.1"]),
    weights=st.none() | st.lists(st.floats(0.05, 10), min_size=3, max_size=3),
    counts=st.tuples(st.integers(1, 300), st.integers(1, 40)),
    seed=st.integers(0, 10_000),
)
def test_blends_and_splits_give_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory,
    split: str,
    weights: list[float] | None,
    counts: tuple[int, int],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("d")
    random = np.random.default_rng(seed)
    prefixes = [
        make_dataset(folder / name, random.integers(10, 40, 150).tolist(), place) for place, name in enumerate("abc")
    ]
    seq_length = 8
    theirs = their_datasets(
        {"seed": seed, "seq_length": seq_length, "blend": (prefixes, weights), "split": split}, [*counts, 0]
    )
    words = prefixes if weights is None else [w for pair in zip(map(str, weights), prefixes, strict=True) for w in pair]
    data = DataConfig(data_path=tuple(words), split=split)
    ours = build_train_valid_test_datasets(data, (*counts, 0), seq_length, seed, ByteTokenizer())
    for mine, yours in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_array_equal(mine.dataset_index, yours.dataset_index)
        np.testing.assert_array_equal(mine.dataset_sample_index, yours.dataset_sample_index)
        assert_same_samples(mine, yours, 30)


def test_one_cache_keeps_apart_all_that_an_index_depends_on(tmp_path: Path) -> None:
    """Documents are of one length, so that the three splits, and two of the datasets, differ in nothing but their place."""
    prefixes = [make_dataset(tmp_path / name, [20] * 90, place) for place, name in enumerate("ab")]
    longer = make_dataset(tmp_path / "c", [21] * 90, 2)
    usual: dict[str, Any] = {"blend": (prefixes, [0.5, 0.5]), "split": "1,1,1", "seq_length": 9, "seed": 3, "count": 50}
    variants: list[dict[str, Any]] = [{}, {"seed": 4}, {"seq_length": 10}, {"count": 51}, {"count": 200}]
    variants += [{"split": split} for split in ("1,2,3", "3,2,1")]
    blends = [(prefixes, [0.4, 0.6]), (prefixes, None), ([prefixes[0], longer], [0.5, 0.5])]
    variants += [{"blend": blend} for blend in (*blends, *(([prefix], None) for prefix in (*prefixes, longer)))]
    for variant in (*variants, *variants):  # built, then read
        options = usual | variant
        (paths, weights), count, seq_length = options["blend"], options.pop("count"), options["seq_length"]
        words = paths if weights is None else [w for pair in zip(map(str, weights), paths, strict=True) for w in pair]
        data = DataConfig(data_path=tuple(words), split=options["split"], data_cache_path=str(tmp_path / "cache"))
        ours = build_train_valid_test_datasets(data, (count,) * 3, seq_length, options["seed"], ByteTokenizer())
        for mine, yours in zip(ours, their_datasets(options, [count] * 3), strict=True):
            assert_same_samples(mine, yours, 15)


def test_a_blend_per_split_and_whole_epochs(tmp_path: Path) -> None:
    prefixes = [make_dataset(tmp_path / name, list(range(9, 60)), place) for place, name in enumerate("abcd")]
    blends = [(prefixes[:2], [0.2, 0.8]), (prefixes[2:], None), (prefixes[:1], None)]
    theirs = their_datasets({"seed": 5, "seq_length": 16, "blend_per_split": blends}, [100, None, 7])
    words = ("0.2", prefixes[0], "0.8", prefixes[1])
    data = DataConfig(train_data_path=words, valid_data_path=tuple(prefixes[2:]), test_data_path=(prefixes[0],))
    ours = build_train_valid_test_datasets(data, (100, None, 7), 16, 5, ByteTokenizer())
    for mine, yours in zip(ours, theirs, strict=True):
        assert_same_samples(mine, yours)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("options", [(True, False), (False, True), (True, True)])
def test_end_of_document_options(tmp_path: Path, options: tuple[bool, bool], resets: bool) -> None:
    """Document ids describe Megatron's attention mask."""
    prefix = make_dataset(tmp_path / "data", [3, 1, 9, 2, 30, 1, 1, 5, 14, 40])
    flags = dict(zip(("reset_position_ids", "eod_mask_loss"), options, strict=True)) | {"reset_attention_mask": resets}
    usual = {"seed": 1, "seq_length": 12, "blend": ([prefix], None), "split": "1", "create_attention_mask": True}
    theirs = their_datasets({**usual, **flags}, [8] * 3)[0]
    data = DataConfig(data_path=(prefix,), split="1", **flags)
    ours = build_train_valid_test_datasets(data, (8, 0, 0), 12, 1, ByteTokenizer())[0]
    assert_same_samples(ours, theirs)
    for index in range(len(ours)):
        ids = ours[index].get("document_ids")
        assert (ids is not None) == resets and (ids is None or ids.dtype == torch.int32)
        same = torch.ones(12, 12, dtype=torch.bool) if ids is None else ids[:, None] == ids[None, :]
        assert torch.equal(~(same & torch.ones_like(same).tril()), theirs[index]["attention_mask"][0])


@RELAXED
@given(weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=6), size=st.integers(0, 400), compiled=st.booleans())
def test_blending_indices(monkeypatch: pytest.MonkeyPatch, weights: list[float], size: int, compiled: bool) -> None:
    shares = np.array(weights) / np.sum(np.array(weights))
    expected = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(*expected, shares, len(weights), size, False)
    sizes = np.maximum((np.array(weights) * 10).astype(np.int64), 1)
    total = int(sizes.sum())
    expected_all = np.zeros(total, dtype=np.int16), np.zeros(total, dtype=np.int64)
    helpers.build_exhaustive_blending_indices(*expected_all, sizes, len(sizes))
    with monkeypatch.context() as patch:
        if not compiled:
            without_extension(patch)
        for ours, theirs in zip(sample_index.build_blending_indices(shares, size), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, theirs in zip(sample_index.build_exhaustive_blending_indices(sizes), expected_all, strict=True):
            np.testing.assert_array_equal(ours, theirs)
