"""Bits per byte: losses per token over the text that the tokens stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.carried_tokenizer import FOLDER
from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_samoe.datasets.train_tokenizer import train_byte_bpe
from megatron_samoe.dist_checkpointing.store import iteration_dir
from megatron_samoe.evaluation.study import text_size
from megatron_samoe.evaluation.study.text_size import bits_per_byte
from tests.harness.serving import save_tiny


def dataset(prefix: Path, documents: list[str]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for text in documents:
        ids = [*text.encode(), 256]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


BYTES = DataConfig(tokenizer_type="ByteTokenizer")


def test_a_part_of_a_corpus_and_a_blend_have_bits_per_byte(tmp_path: Path) -> None:
    short, long = dataset(tmp_path / "short", ["a"] * 20), dataset(tmp_path / "long", ["abcdefghi"] * 20)
    # Of one byte and its end, two tokens; of nine, ten.
    nats = math.log(2)
    split = replace(BYTES, data_path=(dataset(tmp_path / "both", ["a"] * 10 + ["abcdefghi"] * 10),), split="50,50,0")
    assert bits_per_byte(nats, split) == pytest.approx(10 / 9)
    assert bits_per_byte(nats, replace(split, split="25,25,50")) == pytest.approx(2)
    blend = replace(BYTES, valid_data_path=("3", short, "1", long))
    assert bits_per_byte(nats, blend) == pytest.approx(1 / (0.75 * 0.5 + 0.25 * 0.9))
    pooled = replace(BYTES, valid_data_path=(short, long))
    assert bits_per_byte(nats, pooled) == pytest.approx(240 / 200)
    assert bits_per_byte(nats, replace(split, split="100,0,0")) is None, "there is no validation set"
    assert bits_per_byte(nats, replace(BYTES, mock_data=True)) is None


def test_the_tokenizer_that_a_checkpoint_carries_counts(tmp_path: Path) -> None:
    text = "It was a fine day, and a fine night. " * 20
    model, _ = train_byte_bpe(iter([text]), 270, str(tmp_path / "tok"))
    folder = tmp_path / "run"
    save_tiny(folder / "checkpoints", "moe")
    words = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)
    data = replace(words, data_path=(dataset(tmp_path / "corpus", ["abc"] * 10),), split="50,50,0")
    expected = bits_per_byte(2.0, data, folder)
    assert expected is not None
    carried = iteration_dir(folder / "checkpoints", 0) / FOLDER
    carried.mkdir()
    Path(model).rename(carried / "tokenizer_model.json")
    text_size._text_of.cache_clear()
    assert bits_per_byte(2.0, data) is None
    assert bits_per_byte(2.0, data, folder) == expected


def test_of_a_large_set_documents_at_even_distances_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_size, "MOST_TOKENS", 100)
    data = replace(BYTES, valid_data_path=(dataset(tmp_path / "large", ["abcdefghi"] * 100),))
    assert bits_per_byte(math.log(2), data) == pytest.approx(10 / 9)
    assert text_size._text_of(data.valid_data_path[0], (0.0, 1.0), ("ByteTokenizer", None, None, None))[1] == 100


def test_ends_of_documents_are_tokens_without_text(tmp_path: Path) -> None:
    data = replace(BYTES, valid_data_path=(dataset(tmp_path / "valid", ["abcdé", "", "xyz"]),))
    assert bits_per_byte(math.log(2), data) == pytest.approx(12 / 9)


def test_what_is_not_at_hand_has_none(tmp_path: Path) -> None:
    assert bits_per_byte(1.0, DataConfig()) is None
    assert bits_per_byte(1.0, DataConfig(valid_data_path=("0.5", "a", "0.5", "b"))) is None
    for prefix in (str(tmp_path / "absent"), dataset(tmp_path / "empty", [""])):
        assert bits_per_byte(1.0, replace(BYTES, valid_data_path=(prefix,))) is None
