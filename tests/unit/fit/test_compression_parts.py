"""What healing trains, at which rate, on which batch; the page of a compression; and the text to judge on, which is no part of what
models are fitted and trained on."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from megatron_samoe.cli.compress import main as compress_main
from megatron_samoe.config import OptimizerConfig, PretrainConfig, TrainingConfig
from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.fit.compress.healing import (
    OTHERS,
    STAGES,
    HealOptions,
    heal_config,
    other_stage,
    require_rate_and_batch,
)
from megatron_samoe.fit.compress.judge import Verdict, losses, verdict_table
from megatron_samoe.fit.compress.options import CompressOptions, Texts, texts
from megatron_samoe.fit.compress.report import Compressed, _hold_small_and_large, write_compression_report
from tests.harness.datasets import write_dataset
from tests.harness.program import write_corpus
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import new_source

TABLE = table(__file__)

PLAIN = HealOptions()
RUN = replace(
    PretrainConfig(), training=TrainingConfig(micro_batch_size=4, train_iters=50), optimizer=OptimizerConfig(lr=0.02)
)


def config_of(stage: Any, run: PretrainConfig = RUN, options: HealOptions = PLAIN, **trained: int) -> dict[str, Any]:
    return dict(
        heal_config(stage, run, trained, options, Path("start"), "teacher", Path("run"), {"data_path": ["text"]}, 40)
    )


def test_the_original_trains_on_as_the_compressed_model_heals() -> None:
    healed, longer = config_of(STAGES[1]), config_of(OTHERS["original"])
    pattern = healed["optimizer"].pop("lr_mult_patterns")
    assert pattern and "lr_mult_patterns" not in longer["optimizer"]  # all weights
    assert longer["optimizer"] == healed["optimizer"] and longer["optimizer"]["lr"] == 0.02
    assert longer["training"] == healed["training"] and "distillation" not in longer


def test_others_heal_with_all_weights_where_the_compressed_model_does() -> None:
    for name, stage in OTHERS.items():
        assert other_stage(name, (4, 3, 0)) == stage
        assert other_stage(name, (4, 0, 2)) == replace(stage, trained=None)


def test_the_optimizer_is_the_originals() -> None:
    muon = replace(
        RUN, optimizer=OptimizerConfig(optimizer="muon", lr=0.02, muon_momentum=0.9, adam_beta2=0.99, weight_decay=0.3)
    )
    found = config_of(STAGES[0], muon)["optimizer"]
    kept = {"optimizer": "muon", "muon_momentum": 0.9, "adam_beta2": 0.99, "weight_decay": 0.0}
    assert kept.items() <= found.items()


@pytest.mark.parametrize(("training", "trained", "options", "batch"), TABLE["batches"])
def test_the_batch_is_the_originals_over_all_its_ranks(
    training: dict, trained: dict, options: dict, batch: tuple[int, int]
) -> None:
    run = replace(RUN, training=replace(RUN.training, **training))
    found = config_of(STAGES[0], run, HealOptions(**options), **trained)["training"]
    assert (found["micro_batch_size"], found["global_batch_size"]) == batch


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_a_model_from_elsewhere_is_asked_for_its_rate_and_batch(precision: dict[str, bool]) -> None:
    imported = replace(PretrainConfig(), training=TrainingConfig(**precision))
    with pytest.raises(ConfigError, match=r"--heal-lr.*was not trained by this program"):
        require_rate_and_batch(imported, HealOptions(batch_size=8))
    with pytest.raises(ConfigError, match=r"--heal-global-batch-size.*was not trained by this program"):
        require_rate_and_batch(imported, HealOptions(lr=1e-4))
    require_rate_and_batch(imported, HealOptions(lr=1e-4, batch_size=8))
    require_rate_and_batch(RUN, HealOptions())
    assert config_of(STAGES[0], imported, HealOptions(1e-4, 8))["training"].items() >= precision.items()


def test_it_is_asked_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = replace(tiny_config("moe", moe_router_topk=2, mock_data=True), training=TrainingConfig())
    write_checkpoint(tmp_path / "moe", 0, new_source(config))
    write_corpus(tmp_path / "text", vocab_size=103)
    words = (
        f"--load-dir {tmp_path}/moe --save-dir {tmp_path}/out --data-path {tmp_path}/text "
        "--calibration-tokens 512 --judge-tokens 256 --budget 0.5 --heal-iters 4"
    ).split()
    assert compress_main(words) != 0
    assert "--heal-lr" in capsys.readouterr().err and not (tmp_path / "out" / "calibration.json").exists()
    for more, what in (
        (["--heal-lr", "0"], "--heal-lr = 0.0: must be above 0"),
        (["--no-heal-others", "--heal-others-lr", "0.1"], "has no use with --no-heal-others"),
    ):
        assert compress_main([*words, *more]) != 0
        assert what in capsys.readouterr().err


ORIGINAL = Verdict("original", 1000, 5.0, 0.0)
LOST = TABLE["made"]
LEFT = TABLE["healed"]
MADE = [Verdict(name, 500, 5.0 + ce, ce) for name, ce in LOST.items()]
HEALED = [Verdict(name, 500, 5.0 + ce, 0.1) for name, ce in LEFT.items()]


class Fixed:
    """A model of a vocabulary of 5 entries, whose logits are drawn, and padded by what nobody may read."""

    vocab_size = 5

    def __init__(self, seed: int):
        self.logits_TV = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)) * 2

    def __call__(self, _ids: Tensor, _context: object) -> tuple[Tensor, None]:
        return self.logits_TV, None


def test_verdicts_are_scipys_entropies() -> None:
    """KL is of the original's predictions from the model's, not the other way round."""
    original, model = Fixed(1), Fixed(2)
    ids_BS = torch.randint(5, (3, 5), generator=torch.Generator().manual_seed(3))
    p, q = (softmax(m.logits_TV[:, :5].double().numpy(), axis=1) for m in (original, model))
    loss, divergence = losses(original, model, [ids_BS, ids_BS])  # type: ignore[arg-type]
    assert divergence == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-5)
    assert divergence != pytest.approx(entropy(q, p, axis=1).mean(), rel=0.1)
    assert loss == pytest.approx(-np.log(q[range(12), ids_BS[:, 1:].flatten()]).mean(), rel=1e-5)
    assert losses(original, original, [ids_BS])[1] == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]


def sections(path: Path, verdicts: list[Verdict]) -> dict[str, str]:
    """Returns the page's sections by name."""
    write_compression_report(path, Compressed([ORIGINAL, *verdicts], {"0": [0.1, 0.2]}, None, {}))
    parts = re.split(r'<h2 id="(\w+)">', path.read_text())[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(section: str) -> list[str]:
    return re.findall(r"<tr><td>([\w-]+)</td>", section)


def test_healed_models_are_compared_with_healed_ones(tmp_path: Path) -> None:
    page = sections(tmp_path / "page.html", [*MADE, *HEALED])
    assert rows(page["verdicts"]) == ["original", *(v.model for v in HEALED)]
    assert rows(page["made"]) == ["original", *(v.model for v in MADE)]
    assert "-0.0100 nats over the original, +0.0500 over the original trained on by as many steps" in page["verdicts"]
    assert "The fit alone: cross-entropy +0.0200" in page["made"]
    for name, group in (("verdicts", HEALED), ("made", MADE)):
        for verdict in group:
            assert f'<p class="how">{verdict.model}: ' in page[name]


def test_without_healing_there_is_one_comparison(tmp_path: Path) -> None:
    page = sections(tmp_path / "page.html", MADE)
    assert rows(page["verdicts"]) == ["original", *(v.model for v in MADE)] and "made" not in page
    assert "not healed" in page["verdicts"]
    assert verdict_table([ORIGINAL, *MADE])[3] == ["fitted", "500", "0.500", "5.0200", "+0.0200", "0.0200"]


@pytest.mark.parametrize("largest", [4.0, 100.0])
def test_one_large_loss_does_not_flatten_small_ones(largest: float) -> None:
    figure, axes = plt.subplots()
    axes.plot([0.0, 0.02, 0.06, largest], [0, 1, 2, 3])
    _hold_small_and_large(axes.set_xscale, axes.xaxis)
    places = [axes.transAxes.inverted().transform(axes.transData.transform((x, 0.0)))[0] for x in (0.0, 0.02, 0.06)]
    plt.close(figure)
    assert places[1] - places[0] > 0.15 and places[2] - places[1] > 0.05


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
