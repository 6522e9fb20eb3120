"""What healing trains, at which rate, on which batch: the original's where they are known, and the same for the original itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli.compress import main as compress_main
from megatron_samoe.config import OptimizerConfig, PretrainConfig, TrainingConfig
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.compress.healing import (
    OTHERS,
    STAGES,
    HealOptions,
    heal_config,
    other_stage,
    require_rate_and_batch,
)
from tests.harness.program import write_corpus
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import new_source

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


@pytest.mark.parametrize(
    ("training", "trained", "options", "batch"),
    [
        ({"global_batch_size": 32}, {}, {}, (4, 32)),
        ({}, {"iteration": 50, "consumed_samples": 50 * 16}, {}, (4, 16)),  # of four ranks
        ({}, {}, {}, (4, 4)),
        ({"global_batch_size": 32}, {}, {"batch_size": 6}, (3, 6)),
        ({}, {}, {"batch_size": 2}, (2, 2)),
    ],
)
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
