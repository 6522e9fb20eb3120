"""Data of another tokenizer: the refusal says what to give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.errors import DataError


def refusal(*data_path: str) -> str:
    with pytest.raises(DataError) as caught:
        build_train_valid_test_datasets(DataConfig(data_path=data_path, split="1"), (10, 0, 0), 16, 1, ByteTokenizer())
    return str(caught.value)


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A dataset whose manifest says that another tokenizer made it."""
    (tmp_path / "a.txt").write_text("a fine day " * 200)
    preprocess(PreprocessOptions((str(tmp_path / "a.txt"),), str(tmp_path / "a"), executor="inline", quiet=True))
    record = manifest.read(str(tmp_path / "a_text_document"))
    assert record is not None
    record = replace(record, tokenizer_fingerprint="f" * 64, tokenizer_type="HuggingFaceTokenizer", vocab_size=8192)
    manifest.write(str(tmp_path / "b_text_document"), record)
    for end in (".bin", ".idx"):
        (tmp_path / f"b_text_document{end}").write_bytes((tmp_path / f"a_text_document{end}").read_bytes())
    return str(tmp_path / "b_text_document")


def test_the_tokenizer_to_give_or_the_command_to_run_is_named(other: str) -> None:
    said = refusal(other)
    assert "HuggingFaceTokenizer, 8192 entries" in said and "this run (257 entries" in said
    assert "--tokenizer-type HuggingFaceTokenizer" in said and "megatron-samoe preprocess" in said


def test_a_blend_of_two_names_both_and_what_to_do(other: str) -> None:
    first = other.replace("b_text", "a_text")
    said = refusal(first, other)
    assert first in said and other in said and "Make them anew with one" in said


def test_ids_beyond_the_vocabulary_name_the_least_size(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path / 'x'}.bin", np.uint16)
    builder.add_document(np.arange(900), [900])
    builder.finalize(f"{tmp_path / 'x'}.idx")
    said = refusal(str(tmp_path / "x"))
    assert "token id 899" in said and "--vocab-size of 900 or more" in said and "--tokenizer-type" in said
