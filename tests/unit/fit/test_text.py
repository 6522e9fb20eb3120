"""The text to judge on is no part of what models are fitted and trained on, and is of the model's tokenizer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.fit.compress.options import CompressOptions, Texts, texts
from tests.harness.datasets import write_dataset
from tests.harness.tiny import tiny_config

BYTES = build_tokenizer("ByteTokenizer", None, None, None)
MODEL: PretrainConfig = tiny_config("moe")


def corpus(prefix: Path, sizes: list[int], first_id: int = 0) -> Path:
    """Writes a dataset whose document n holds the id n + first_id alone."""
    return Path(write_dataset(prefix, [np.full(size, number + first_id) for number, size in enumerate(sizes)]))


def read(path: Path, **more: Any) -> Texts:
    given = {"calibration_tokens": 64, "judge_tokens": 64, **more}
    return texts(CompressOptions("", "", str(path), **given), MODEL, 200, BYTES)


def ids(passes: list[torch.Tensor]) -> set[int]:
    return {int(i) for p in passes for i in p.unique()}


@pytest.mark.parametrize(
    ("sizes", "held_out"), [([40] * 10, {8, 9}), ([40, 40, 65], {2}), ([200, 30, 34], {0}), ([90, 64, 1], {1, 2})]
)
def test_what_is_judged_is_neither_calibrated_nor_trained_on(
    sizes: list[int], held_out: set[int], tmp_path: Path
) -> None:
    path = corpus(tmp_path / "text", sizes)
    if held_out == {0}:  # all documents would be held out
        with pytest.raises(DataError, match=r"3 documents with 264 tokens.*cannot be held out. Give --valid-data-path"):
            read(path)
        return
    read_texts = read(path)
    assert ids(read_texts.judged) <= held_out and not ids(read_texts.calibration) & held_out
    data = replace(
        MODEL.data,
        mock_data=False,
        **{name: tuple(v) if isinstance(v, list) else v for name, v in read_texts.training.items()},
    )
    train, valid, _ = build_train_valid_test_datasets(data, (20, 2, 0), 16, 1, BYTES)
    assert train is not None and valid is not None
    trained, validated = (
        {int(i) for n in range(count) for i in split[n]["tokens"]} for split, count in ((train, 20), (valid, 2))
    )
    assert trained == set(range(len(sizes))) - held_out and validated <= held_out


def test_text_of_its_own_is_judged_on(tmp_path: Path) -> None:
    path, other = corpus(tmp_path / "text", [300]), corpus(tmp_path / "valid", [300], first_id=7)
    read_texts = read(path, valid_data_path=str(other))
    assert ids(read_texts.judged) == {7} and ids(read_texts.calibration) == {0}
    assert read_texts.training == {"train_data_path": [str(path)], "valid_data_path": [str(other)]}


def record(prefix: Path, fingerprint: str, checksum: int) -> None:
    manifest.write(
        str(prefix), manifest.Manifest("ByteTokenizer", fingerprint, 257, 256, 1, 1, 300, 9, 600, checksum, 0)
    )


def test_one_text_under_two_names_is_refused(tmp_path: Path) -> None:
    path = corpus(tmp_path / "text", [300])
    copy = tmp_path / "copy"
    for end in (".bin", ".idx"):
        shutil.copyfile(f"{path}{end}", f"{copy}{end}")
    (tmp_path / "link.bin").symlink_to(f"{path}.bin")
    (tmp_path / "link.idx").symlink_to(f"{path}.idx")
    for prefix in (path, copy):
        record(prefix, BYTES.fingerprint, 77)
    for same in (path, tmp_path / "link", copy):
        with pytest.raises(ConfigError, match=r"--valid-data-path.*is the text of --data-path"):
            read(path, valid_data_path=str(same))
    record(copy, BYTES.fingerprint, 78)
    read(path, valid_data_path=str(copy))


@pytest.mark.parametrize("which", ["text", "valid"])
def test_text_of_another_tokenizer_is_refused_whatever_its_ids(which: str, tmp_path: Path) -> None:
    """As training refuses it: by what the preprocessor left beside the dataset."""
    path, other = corpus(tmp_path / "text", [300]), corpus(tmp_path / "valid", [300])
    record(tmp_path / which, "0" * 64, 5)
    with pytest.raises(DataError, match=f"{which} was made with another tokenizer"):
        read(path, valid_data_path=str(other))
