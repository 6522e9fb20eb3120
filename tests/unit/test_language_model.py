"""`megatron_samoe.load`: logits, texts and scores of a trained model in Python, and the notebook that shows them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_samoe
from megatron_samoe.errors import CheckpointError, ConfigError
from tests.harness.program import REPOSITORY
from tests.harness.serving import CONTEXT, save_tiny

TEXT = "Emma was very much surprised"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> megatron_samoe.LanguageModel:
    return megatron_samoe.load(folder)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, megatron_samoe; print(dir(megatron_samoe)); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert "'load'" in shown and shown.strip().endswith("False")
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        megatron_samoe.loda  # noqa: B018


def test_logits_decide_greedy_text_and_scores(model: megatron_samoe.LanguageModel) -> None:
    ids = model.tokenizer.encode(TEXT)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.loaded.model.vocab_size)
    torch.testing.assert_close(model.logits([ids, ids])[1], logits)
    torch.testing.assert_close(model.logits(torch.tensor(ids)), logits)
    greedy = model.generate_ids(ids, 5, temperature=0.0)
    again = list(ids)
    for _ in greedy:
        again.append(int(model.logits(again)[-1].argmax()))
    assert again[len(ids) :] == greedy
    split = 10
    expected = logits.log_softmax(-1)[range(split - 1, len(ids) - 1), ids[split:]].sum()
    score = model.score(TEXT[:split], TEXT[split:])
    assert score.loglikelihood == pytest.approx(float(expected), rel=1e-5) and not score.is_greedy


def test_texts_come_alone_together_or_as_a_stream(model: megatron_samoe.LanguageModel) -> None:
    alone = [model.generate(prompt, 12, temperature=0.0) for prompt in ("Emma", "Mr. Knightley")]
    assert model.generate(["Emma", "Mr. Knightley"], 12, temperature=0.0) == alone
    assert "".join(model.stream("Emma", 12, temperature=0.0)) == alone[0]
    assert model.generate([], 5) == []


def test_a_text_longer_than_the_context_has_a_perplexity(model: megatron_samoe.LanguageModel) -> None:
    text = TEXT * 5
    assert len(text) > CONTEXT
    score = model.score_text(text)
    assert score.num_tokens == score.num_bytes == len(text)
    assert score.perplexity == pytest.approx(math.exp(-score.loglikelihood / len(text)))
    assert score.bits_per_byte == pytest.approx(math.log2(score.perplexity))
    assert isinstance(model.generate(text, 3), str)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([[1, 2], [3]], "in sequences of one length"),
        ([], "must be whole numbers of shape"),
        ([0.5], "must be whole numbers of shape"),
        ([0] * (CONTEXT + 1), f"with S from 1 to {CONTEXT}"),
        ([257], "must be from 0 to 256"),
        (["a"], "must be whole numbers"),
    ],
)
def test_wrong_ids_are_named(model: megatron_samoe.LanguageModel, ids: list, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        model.logits(ids)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        megatron_samoe.load(tmp_path)


def test_the_notebook_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((REPOSITORY / "examples/python_api.ipynb").read_text())
    monkeypatch.setenv("RUN", str(folder))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "combination" in shown and "next:" in shown
