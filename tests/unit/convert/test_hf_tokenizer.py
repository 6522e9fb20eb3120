"""A tokenizer next to exported weights: transformers gives the ids and texts of the run's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.hf.tokenizer_files import tokenizer_files
from megatron_samoe.datasets.tokenizer import Tokenizer, build_tokenizer
from megatron_samoe.datasets.train_tokenizer import train_sentencepiece
from tests.harness.program import REPOSITORY

transformers = pytest.importorskip("transformers", minversion="4.56")
CORPUS = (REPOSITORY / "megatron_samoe/cli/quickstart_data/austen_emma_mansfield.txt").read_text()
TRICKY = st.text(st.sampled_from("\n\n  ▁ab1é中🚀.\t<s>") | st.characters(codec="utf-8"), max_size=40)


def options_of(model: Path) -> DataConfig:
    return DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, object]:
    """Our tokenizer over a model that our tool trained, and transformers' over the exported files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    data = options_of(Path(train_sentencepiece(iter([CORPUS[:150_000]]), request.param, 700, str(folder / "tok"))))
    files = tokenizer_files(data)
    files.write(folder, 128)
    assert sorted(files.files) == ["tokenizer.json", "tokenizer.model"]
    ours = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_our_trained_models_load_with_transformers(both: tuple[Tokenizer, object]) -> None:
    ours, theirs = both
    text = CORPUS[200_000:240_000]
    ids = theirs(text).input_ids
    assert ids == ours.encode(text) and theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs), theirs.model_max_length) == (ours.eod, ours.vocab_size, 128)


@settings(deadline=None, max_examples=150)
@given(TRICKY)
def test_any_text_without_control_tokens_has_the_same_ids(both: tuple[Tokenizer, object], text: str) -> None:
    ours, theirs = both
    if not any(name in text for name in ("<s>", "</s>", "<unk>")):
        assert theirs(text).input_ids == ours.encode(text)


def test_a_model_that_cuts_words_otherwise_goes_without_a_fast_one(tmp_path: Path) -> None:
    """An own piece of several letters stands before text that gets no space there."""
    lines, prefix = iter(CORPUS[:50_000].splitlines()), str(tmp_path / "tok")
    options = {"model_type": "bpe", "vocab_size": 600, "user_defined_symbols": ["<tag>"], "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, minloglevel=2, **options)
    files = tokenizer_files(options_of(tmp_path / "tok.model"))
    assert list(files.files) == ["tokenizer.model"] and "has no equal among fast tokenizers" in files.notes[0]


def test_gpt2_files_are_those_of_transformers_own_class(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([CORPUS[:150_000]], 700, special_tokens=["<|endoftext|>"], show_progress=False)
    vocabulary, merges = bpe.save_model(str(tmp_path))
    data = DataConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocabulary, merge_file=merges)
    tokenizer_files(data).write(tmp_path / "hf", 128)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "hf")
    text = CORPUS[200_000:240_000]
    expected = tokenizers.ByteLevelBPETokenizer.from_file(vocabulary, merges).encode(text).ids
    assert theirs(text).input_ids == expected and theirs.decode(expected) == text
    assert theirs.eos_token_id == bpe.token_to_id("<|endoftext|>") and theirs.model_max_length == 128
