"""Bits per byte: losses per token over the text that the tokens stand for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_samoe.evaluation.study.text_size import bits_per_byte


def dataset(folder: Path, documents: list[str]) -> str:
    builder = IndexedDatasetBuilder(f"{folder / 'valid'}.bin", np.uint16)
    for text in documents:
        ids = [*text.encode(), 256]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{folder / 'valid'}.idx")
    return str(folder / "valid")


def test_ends_of_documents_are_tokens_without_text(tmp_path: Path) -> None:
    data = DataConfig(valid_data_path=(dataset(tmp_path, ["abcdé", "", "xyz"]),), tokenizer_type="ByteTokenizer")
    assert bits_per_byte(math.log(2), data) == pytest.approx(12 / 9)


def test_what_is_not_at_hand_has_none(tmp_path: Path) -> None:
    assert bits_per_byte(1.0, DataConfig()) is None
    assert bits_per_byte(1.0, DataConfig(valid_data_path=("0.5", "a", "0.5", "b"))) is None
    assert (
        bits_per_byte(1.0, DataConfig(valid_data_path=(str(tmp_path / "absent"),), tokenizer_type="ByteTokenizer"))
        is None
    )
    prefix = dataset(tmp_path, [""])
    assert bits_per_byte(1.0, DataConfig(valid_data_path=(prefix,), tokenizer_type="ByteTokenizer")) is None
