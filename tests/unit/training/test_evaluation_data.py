"""Which held-out samples a run evaluates, and what it says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_samoe.cli.pretrain import main
from megatron_samoe.config import PretrainConfig
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import initialize_model_parallel, single_process_state
from megatron_samoe.training.batches import RunData, build_run_data
from megatron_samoe.training.evaluate import EvaluatedLoss, evaluate
from megatron_samoe.training.setup import build_setup
from tests.harness.datasets import random_dataset
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_options

STATE = single_process_state()
BYTES = ByteTokenizer()


def make(path: Path, documents: int, length: int, seed: int) -> str:
    return random_dataset(path, [length] * documents, 256, seed)


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    return make(tmp_path / "a", 40, 50, 1), make(tmp_path / "b", 30, 33, 2)


def configured(**options: Any) -> PretrainConfig:
    options = {"train_iters": 2, "split": "60,20,20", **options}
    return with_options(tiny_config("moe"), **options)


def run_data(config: PretrainConfig) -> RunData:
    return build_run_data(config, BYTES, STATE)


def tokens_of(data: RunData) -> list[torch.Tensor]:
    assert data.valid is not None
    return [batch["tokens"] for batch in data.evaluation_batches(data.valid)]


def test_validation_and_test_samples_do_not_depend_on_the_seed(corpora: tuple[str, str]) -> None:
    one, two = (run_data(configured(data_path=corpora, seed=seed)) for seed in (1, 2))
    for first, second in zip(tokens_of(one), tokens_of(two), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(next(one.train_batches(0))[0]["tokens"], next(two.train_batches(0))[0]["tokens"])


def test_what_a_run_reads_is_said(corpora: tuple[str, str]) -> None:
    """Of 40 documents of 50 tokens 24, 8 and 8; two steps of 4 sequences of 16 tokens are 8 of (24 * 50 - 1) // 16 samples."""
    one = run_data(configured(data_path=corpora[:1], eval_iters=1, global_batch_size=4)).summary()
    assert "1,200 tokens to train on (0.108 passes by the last step)" in one
    assert "400 for validation (64 read each time), 400 for test (64 read each time)" in one
    both = run_data(configured(data_path=corpora, split="100,0,0", skip_train=False, eval_iters=0)).summary()
    assert both == f"data: {40 * 50 + 30 * 33:,} tokens to train on"
    assert "mock" in run_data(configured(mock_data=True)).summary()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_full_validation_takes_every_sample_once(corpora: tuple[str, str], micro_batch_size: int) -> None:
    config = configured(data_path=corpora[:1], full_validation=True, micro_batch_size=micro_batch_size)
    data = run_data(config)
    assert data.valid is not None
    count = len(data.valid.dataset)
    assert count == 8 * 50 // 16 - (8 * 50 % 16 == 0), "eight documents of 50 tokens are the validation split"
    batches = list(data.evaluation_batches(data.valid))
    assert sum(len(b["tokens"]) for b in batches) == -(-count // micro_batch_size) * micro_batch_size
    setup = build_setup(config, BYTES.vocab_size, STATE, torch.float64)
    setup.model.begin_step()
    whole = data.valid.dataset.get_batch(range(count))
    with torch.no_grad():
        logits, _ = setup.model(whole["tokens"], ForwardContext(count))
    expected = F.cross_entropy(logits[:, : BYTES.vocab_size], whole["labels"].flatten()).item()
    assert evaluate(setup, batches).mean == pytest.approx(expected, rel=1e-10)


def blend_losses(config: PretrainConfig, world: int) -> EvaluatedLoss:
    parallel = STATE if world == 1 else initialize_model_parallel(config.parallel, "cpu")
    data = build_run_data(config, BYTES, parallel)
    setup = build_setup(config, BYTES.vocab_size, parallel, torch.float64)
    assert data.valid is not None
    return evaluate(setup, data.evaluation_batches(data.valid), data.valid.names)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_each_dataset_of_a_blend_has_its_own_loss(corpora: tuple[str, str], full: bool, weights: bool) -> None:
    path = ("1", corpora[0], "3", corpora[1]) if weights else corpora
    config = configured(data_path=path, full_validation=full, eval_iters=3)
    losses = blend_losses(config, 1)
    assert list(losses.by_dataset) == list(corpora)
    if full:
        for prefix in corpora:
            alone = blend_losses(with_options(config, data_path=(prefix,)), 1)
            assert losses.by_dataset[prefix] == pytest.approx(alone.mean, rel=1e-12)
    assert min(losses.by_dataset.values()) < losses.mean < max(losses.by_dataset.values())


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, {"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_ranks_evaluate_the_same_samples_as_one_process(corpora: tuple[str, str], layout: dict[str, int]) -> None:
    config = configured(data_path=corpora, full_validation=True)
    expected = blend_losses(config, 1)
    for losses in run_ranks(blend_losses, 2, with_options(config, **layout), 2):
        assert losses.mean == pytest.approx(expected.mean, rel=1e-11)
        assert losses.by_dataset == pytest.approx(expected.by_dataset, rel=1e-11)


def pretrain(folder: Path, *flags: str) -> list[dict[str, Any]]:
    sizes = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --train-iters 2 --eval-iters 1"
    assert main([*sizes.split(), "--num-threads", "1", "--run-dir", str(folder), *flags]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_test_data_are_evaluated_once_at_the_end(corpora: tuple[str, str], tmp_path: Path) -> None:
    paths = ["--train-data-path", corpora[0], "--valid-data-path", corpora[0], "--test-data-path", *corpora]
    records = pretrain(tmp_path / "run", *paths, "--eval-interval", "1")
    assert ["test_loss" in r for r in records] == [False, True]
    last = records[-1]
    assert last["test_perplexity"] == pytest.approx(math.exp(last["test_loss"]))
    assert list(last["test_loss_by_dataset"]) == list(corpora)
    assert "validation_loss" in last and "validation_loss_by_dataset" not in last


def test_the_third_part_of_a_split_is_test_data_where_it_has_any(
    corpora: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "test_loss" in pretrain(tmp_path / "some", "--data-path", corpora[0], "--split", "60,20,20")[-1]
    assert "test_loss" not in pretrain(tmp_path / "none", "--data-path", corpora[0], "--split", "80,20,0")[-1]
    assert "test_loss" not in pretrain(tmp_path / "little", "--data-path", corpora[0], "--split", "800,199,1")[-1]
    assert "There will be no test loss." in caplog.text


def test_a_checkpoint_is_evaluated_without_training_data_or_optimizer(corpora: tuple[str, str], tmp_path: Path) -> None:
    trained = pretrain(tmp_path / "run", "--data-path", corpora[0], "--split", "60,20,20", "--optimizer", "muon")[-1]
    again = pretrain(tmp_path / "run", "--skip-train", "--test-data-path", *corpora)[-1]
    assert again["iteration"] == 2 and "validation_loss" not in again and again["test_loss"] > 0
    same = pretrain(tmp_path / "run", "--skip-train", "--data-path", corpora[0], "--split", "60,20,20")[-1]
    assert same["validation_loss"] == trained["validation_loss"] and same["test_loss"] == trained["test_loss"]
