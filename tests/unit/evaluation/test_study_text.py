"""Text of studies: data from a folder, and bits per byte, which are losses per token over the text of the tokens."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_samoe.config import CheckpointConfig, PretrainConfig
from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.carried_tokenizer import FOLDER, vocabulary_of
from megatron_samoe.datasets.train_tokenizer import train_byte_bpe
from megatron_samoe.dist_checkpointing.store import iteration_dir
from megatron_samoe.errors import DataError
from megatron_samoe.evaluation.study import text_folder, text_size
from megatron_samoe.evaluation.study.text_size import bits_per_byte
from megatron_samoe.log import logger
from tests.harness.datasets import write_dataset
from tests.harness.serving import save_tiny


def dataset(prefix: Path, documents: list[str]) -> str:
    return write_dataset(prefix, [[*text.encode(), 256] for text in documents])


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


def test_the_tokenizer_that_a_checkpoint_carries_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO", logger.name):
        run = PretrainConfig(data=data, checkpoint=CheckpointConfig(load=str(folder / "checkpoints")))
        assert vocabulary_of(run).tokenizer.vocab_size == 270
    assert f"carries, instead of {model}" in caplog.text, "who misspelt a path reads it"


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


def test_programs_that_begin_at_once_make_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/novel.txt").write_text("\n\n".join(f"Paragraph {n}. " + "word " * 100 for n in range(200)))
    steps: list[str] = []

    def step(*words: str) -> None:  # which would train a tokenizer
        steps.append(words[0])
        time.sleep(0.1)

    monkeypatch.setattr(text_folder, "_step", step)
    said: list[str] = []
    with ThreadPoolExecutor(3) as programs:
        begun = [
            programs.submit(text_folder.prepare, tmp_path / "texts", tmp_path / "out", 500, said.append)
            for _ in range(3)
        ]
    flags = [one.result() for one in begun]
    assert steps == ["train-tokenizer", "preprocess", "preprocess", "preprocess"] and len(said) == 1
    assert flags[0] == flags[1] == flags[2] and str(tmp_path / "out/valid_text_document") in flags[0]
    parts = [(tmp_path / f"out/{part}.jsonl").read_text().splitlines() for part in ("train", "valid", "test")]
    assert min(map(len, parts)) >= 2 and len(set(parts[0]) | set(parts[1]) | set(parts[2])) == sum(map(len, parts))


def test_too_little_text_is_refused_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("Short.")
    with pytest.raises(DataError, match=r"has 1 files ending in \.txt, \.md, \.text with 1 documents"):
        text_folder.prepare(tmp_path, tmp_path / "out", 500, print)
