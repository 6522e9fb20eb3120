"""`megatron_samoe.load`: logits, texts and scores of a trained model in Python, and the notebook that shows them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_samoe
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.language_model import Sampling
from tests.harness.program import REPOSITORY
from tests.harness.serving import CONTEXT, save_tiny
from tests.harness.tables import table

TABLE = table(__file__)

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


def test_an_answer_waits_for_no_library_that_it_does_not_use(folder: Path) -> None:
    """DTensor, sympy and what reads other formats would take as long to import as all else but torch."""
    code = (
        "import sys, megatron_samoe\n"
        f"megatron_samoe.load({str(folder)!r}).generate('It was', 2)\n"
        "slow = ('sympy', 'torch.distributed.tensor', 'transformers', 'matplotlib', 'scipy', 'starlette', 'tensorboard')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logits_decide_greedy_text_and_scores(model: megatron_samoe.LanguageModel) -> None:
    ids = model.tokenizer.encode(TEXT)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.loaded.model.vocab_size)
    torch.testing.assert_close(model.logits([ids, ids])[1], logits)
    torch.testing.assert_close(model.logits(torch.tensor(ids)), logits)
    torch.testing.assert_close(model.logits(TEXT), logits)
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


def test_options_are_named_for_readers_and_by_sentences(model: megatron_samoe.LanguageModel) -> None:
    for method in (model.generate, model.stream, model.chat, model.generate_ids):
        shown = inspect.signature(method).parameters
        assert shown["temperature"].default == 1.0 and "options" not in shown
    defaults = {f.name: f.type for f in dataclasses.fields(SamplingOptions)}
    assert {"max_new_tokens", *Sampling.__annotations__} == set(defaults)
    for name, said in TABLE["options"]:
        for use in (model.generate, model.stream, model.chat):
            with pytest.raises(ConfigError, match=f"{name} = 5: .*{said}"):
                use("Emma", **{name: 5})  # type: ignore[operator]
    with pytest.raises(ConfigError, match="top_p = 7: must be above 0"):
        model.generate("Emma", top_p=7)


def test_one_engine_makes_all_texts_also_several_at_a_time(model: megatron_samoe.LanguageModel) -> None:
    alone = {prompt: model.generate(prompt, 12, temperature=0.0) for prompt in ("Emma", "Mr. Knightley", "She")}
    engine = model._engine
    one, other = (model.stream(prompt, 12, temperature=0.0) for prompt in ("Emma", "Mr. Knightley"))
    pieces = {"Emma": next(one), "Mr. Knightley": next(other)}
    assert model.generate("She", 12, temperature=0.0) == alone["She"], "between the pieces of others"
    left = model.stream("She", 12, temperature=0.0)
    next(left)
    left.close()  # type: ignore[attr-defined]
    for first, second in zip(one, other, strict=False):
        pieces["Emma"] += first
        pieces["Mr. Knightley"] += second
    pieces["Emma"] += "".join(one)
    pieces["Mr. Knightley"] += "".join(other)
    assert pieces == {prompt: alone[prompt] for prompt in pieces}
    assert model._engine is engine and not engine.has_work and not model._unread


def test_equal_texts_of_a_list_are_drawn_apart(model: megatron_samoe.LanguageModel) -> None:
    first, second = model.generate(["Emma", "Emma"], 12, temperature=9.0, seed=4)
    assert first != second and second == model.generate("Emma", 12, temperature=9.0, seed=5)


def test_the_model_and_its_tokenizer_show_what_they_are(model: megatron_samoe.LanguageModel) -> None:
    assert repr(model.tokenizer) == "ByteTokenizer(257 tokens, end of a document 256)"
    with pytest.raises(ConfigError, match="it is a base model, which continues texts"):
        model.chat("Hello")


def test_a_text_longer_than_the_context_has_a_perplexity(model: megatron_samoe.LanguageModel) -> None:
    text = TEXT * 5
    assert len(text) > CONTEXT
    score = model.score_text(text)
    assert score.num_tokens == score.num_bytes == len(text)
    assert score.perplexity == pytest.approx(math.exp(-score.loglikelihood / len(text)))
    assert score.bits_per_byte == pytest.approx(math.log2(score.perplexity))
    for use in (model.generate, lambda text: list(model.stream(text)), model.logits):
        with pytest.raises(ConfigError, match=str(len(text))):  # nothing is cut without a word
            use(text)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([[1, 2], [3]], "in sequences of one length"),
        ([], "must be whole numbers of shape"),
        ([0.5], "must be whole numbers of shape"),
        ([0] * (CONTEXT + 1), f"with S from 1 to {CONTEXT}"),
        ([257], "must be from 0 to 256"),
        (["a"], "must be a text, or whole numbers"),
    ],
)
def test_wrong_ids_are_named(model: megatron_samoe.LanguageModel, ids: list, problem: str) -> None:
    for use in (model.logits, model.loss):
        with pytest.raises(ConfigError, match=problem):
            use(ids)


def test_a_token_alone_has_no_loss(model: megatron_samoe.LanguageModel) -> None:
    with pytest.raises(ConfigError, match="needs two tokens or more"):
        model.loss("E")


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
    assert all(
        part in shown for part in ("loss", "perplexity", "combination", "next:", "it is a base model", "config.json")
    )
