"""What a report lacks is said with the flag that measures it, and what trained a model stands beside its loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.cli.init import _shown
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.carried_tokenizer import FOLDER
from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_samoe.datasets.train_tokenizer import train_byte_bpe
from megatron_samoe.dist_checkpointing.store import iteration_dir
from megatron_samoe.evaluation.report import write_report
from megatron_samoe.evaluation.report_tables import results_table
from megatron_samoe.evaluation.run_groups import group_runs
from megatron_samoe.evaluation.run_summary import read_run
from megatron_samoe.evaluation.study import text_size
from megatron_samoe.evaluation.study.text_size import bits_per_byte
from tests.harness.serving import save_tiny


def run(folder: Path, layout: str, experts: bool = False, **options: object) -> Path:
    save_tiny(folder / "checkpoints", layout, **options)
    record = {
        "iteration": 4,
        "consumed_tokens": 400,
        "lm_loss": 2.5,
        "validation_loss": 2.5,
        "validation_perplexity": 12.2,
    }
    if experts:
        record |= {"expert_load": [[0.25] * 4] * 2, "expert_grad_norm": [[1.0] * 4] * 2}  # type: ignore[dict-item]
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def page_of(tmp_path: Path, *runs: Path) -> str:
    write_report(tmp_path / "report.html", "Runs", [read_run(path) for path in runs])
    return (tmp_path / "report.html").read_text()


def test_what_was_not_measured_names_the_flag(tmp_path: Path) -> None:
    moe = run(tmp_path / "moe", "moe")
    page = page_of(tmp_path, moe)
    lacking = page[page.index("Expert load per layer") :]
    assert "No run was made with --moe-per-layer-logging, which measures them." in lacking
    assert "Zero-shot tasks. megatron-samoe evaluate --json FILE measures them" in page
    assert "Learned combinations" not in page, "a MoE has none, whatever is measured"
    page = page_of(tmp_path, moe, run(tmp_path / "samoe", "samoe"))
    assert "Learned combinations" in page
    assert "--moe-per-layer-logging" not in page_of(tmp_path, run(tmp_path / "dense", "dense"))
    measured = page_of(tmp_path, run(tmp_path / "measured", "moe", experts=True))
    assert "--moe-per-layer-logging" not in measured and 'id="expert_load"' in measured


@pytest.mark.parametrize("layout", ["samoe", "moe", "dense"])
def test_a_new_project_measures_them(layout: str) -> None:
    logging = _shown(layout, 100_000)["logging"]
    assert logging.get("moe_per_layer_logging") is (None if layout == "dense" else True)
    given = {
        group: {name: value for name, value in options.items() if value is not None}
        for group, options in _shown(layout, 100_000).items()
    }
    assert from_mapping(given, "config.yaml").logging.moe_per_layer_logging == (layout != "dense")


def test_optimizer_and_rate_stand_beside_the_loss(tmp_path: Path) -> None:
    runs = [run(tmp_path / "adam", "moe", lr=3e-4), run(tmp_path / "muon", "moe", optimizer="muon", lr=0.002)]
    derived = run(tmp_path / "derived", "moe")
    (derived / "metrics.jsonl").write_text(json.dumps({"iteration": 4, "validation_loss": 2.5}) + "\n")
    head, *rows = results_table(group_runs([read_run(path) for path in (*runs, derived)]))
    assert [row[head.index("optimizer, rate")] for row in rows] == ["adam, 0.0003", "muon, 0.002", "-"]


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
    folder = run(tmp_path / "run", "moe")
    data = DataConfig(data_path=(dataset(tmp_path / "corpus", ["abc"] * 10),), split="50,50,0",
                      tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)  # fmt: skip
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
