"""A model's scores where lm-evaluation-harness has none to compare with (`tests/parity/test_lm_eval.py`), and in every layout."""

from __future__ import annotations

import math
import random
import string
from functools import cache
from typing import Any

import pytest
import torch

from megatron_samoe.datasets.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from megatron_samoe.datasets.train_tokenizer import train_byte_bpe
from megatron_samoe.errors import DataError
from megatron_samoe.evaluation.zero_shot.data_files import Document
from megatron_samoe.evaluation.zero_shot.encode import encode_pair, encode_prompt, split_pair
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor
from megatron_samoe.evaluation.zero_shot.results import evaluate_corpus
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.tables import table
from tests.unit.inference.tiny_models import forward_logits, loaded_tiny

SEQ_LENGTH = 16
TABLE = table(__file__)
PAIRS: list[tuple[str, str]] = list(TABLE["pairs"])


@cache
def loaded_model(experts: str = "samoe", **options: Any) -> LoadedModel:
    return loaded_tiny(experts, style="llama", seq_length=SEQ_LENGTH, **options)


def plain_log_probs(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Returns log-probabilities [S, V] of one sequence by itself."""
    return forward_logits(loaded, tokens).double().log_softmax(-1)


@pytest.mark.parametrize("experts", ["samoe", "moe"])
def test_no_batch_size_or_order_changes_a_score(experts: str) -> None:
    loaded = loaded_model(experts)
    expected = ModelPredictor(loaded).score_pairs(PAIRS)
    order = list(range(len(PAIRS)))
    for batch_size in (1, 2, 3, 100):
        random.Random(batch_size).shuffle(order)
        scores = ModelPredictor(loaded, batch_size).score_pairs([PAIRS[n] for n in order])
        for n, score in zip(order, scores, strict=True):
            assert score.loglikelihood == pytest.approx(expected[n].loglikelihood, rel=1e-6)
            assert score.is_greedy == expected[n].is_greedy
    assert expected[0] == expected[-1], "equal rows are computed once"


def test_a_continuation_is_greedy_where_the_model_would_write_it() -> None:
    predictor = ModelPredictor(loaded_model())
    # A prompt after which this untrained model writes two characters, not broken bytes.
    prompts = [f"The cat {letter}" for letter in string.printable.strip()]
    written = [text for text, _ in predictor.generate(prompts, (), 2)]
    prompt, greedy = next((p, t) for p, t in zip(prompts, written, strict=True) if t.isascii() and len(t) == 2)
    other = greedy[0] + ("a" if greedy[1] != "a" else "b")
    assert [score.is_greedy for score in predictor.score_pairs([(prompt, greedy), (prompt, other)])] == [True, False]


def test_no_token_is_dropped_in_evaluation() -> None:
    free = loaded_model("moe")
    tight = loaded_model("moe", moe_expert_capacity_factor=0.25)
    # In training the same capacity does drop tokens, which the scores would show.
    tokens = torch.randint(0, 256, (1, SEQ_LENGTH), generator=torch.Generator().manual_seed(0))
    context = ForwardContext(batch_size=1, training=True)
    _, training = tight.model(tokens, context, chunk=0)
    assert sum(int(stats.sums["dropped"]) for stats in training) > 0
    assert ModelPredictor(tight).score_pairs(PAIRS) == ModelPredictor(free).score_pairs(PAIRS)


def test_a_continuation_longer_than_the_model_is_scored_in_windows() -> None:
    loaded = loaded_model()
    (score,) = ModelPredictor(loaded).score_pairs([("ab", "c" * 20)])
    text = [ord("b"), *b"c" * 20]
    first = plain_log_probs(loaded, text[:16])
    second = plain_log_probs(loaded, text[4:20])
    expected = float(first[:, ord("c")].sum() + second[-4:, ord("c")].sum())
    assert score.loglikelihood == pytest.approx(expected, rel=1e-5)
    assert (score.num_windows, score.cut_tokens) == (2, 1)


def test_perplexity_per_token_byte_and_word() -> None:
    loaded = loaded_model()
    documents = [Document("a", "wörter and words, more than sixteen bytes"), Document("b", "two\nwords")]
    result = evaluate_corpus("corpus:x", documents, ModelPredictor(loaded))
    total = 0.0
    for document in documents:
        ids = list(document.text.encode())
        for place in range(len(ids)):
            window = place // SEQ_LENGTH
            end = min(len(ids), (window + 1) * SEQ_LENGTH)
            row = [256, *ids][max(0, end - SEQ_LENGTH) : place + 1]
            total += float(plain_log_probs(loaded, row)[-1, ids[place]])
    num_bytes, num_words = 42 + 9, 7 + 2
    values = {name: measured.value for name, measured in result.metrics.items()}
    assert values["byte_perplexity"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-4)
    assert values["token_perplexity"] == pytest.approx(values["byte_perplexity"])  # a token is a byte here
    assert values["word_perplexity"] == pytest.approx(math.exp(-total / num_words), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)
    assert result.num_items == 2 and math.isfinite(result.metrics["token_perplexity"].stderr)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    texts = iter(["the theory of the thing that they think"] * 50)
    return HuggingFaceTokenizer(train_byte_bpe(texts, 300, str(tmp_path_factory.mktemp("bpe") / "words"))[0])


def test_pairs_are_encoded_as_one_text(bpe: HuggingFaceTokenizer) -> None:
    context, continuation = split_pair(bpe, "the thing ", "they")
    assert context == bpe.encode("the thing") and continuation == bpe.encode(" they")
    assert split_pair(bpe, "", "they") == ([bpe.eod], bpe.encode("they"))
    assert split_pair(bpe, "  ", "they") == ([bpe.eod], bpe.encode("  they"))
    # "th" + "e" is the one token "the": something is left to score.
    assert len(bpe.encode("the")) == 1
    assert split_pair(bpe, "th", "e") == ([bpe.eod], bpe.encode("the"))
    before, after = split_pair(bpe, "of th", "e")
    assert (before, after) == (bpe.encode("of"), bpe.encode(" the")) and len(bpe.encode(" the")) == 1
    with pytest.raises(DataError, match="has no token"):
        split_pair(bpe, "", "")


def test_what_does_not_fit() -> None:
    tokenizer = ByteTokenizer()
    pair = encode_pair(tokenizer, "0123456789", "abc", 5)
    assert (
        pair.cut_tokens == 7 and pair.queries[0].tokens == tuple(b"789ab") and pair.queries[0].labels == tuple(b"abc")
    )
    assert encode_prompt(tokenizer, "0123456789", 5, 3) == (list(b"89"), 8)
    assert encode_prompt(tokenizer, "", 5, 4) == ([256], 0)
    with pytest.raises(DataError, match="answers of up to 5 tokens leave no room for a prompt: the model reads 5"):
        encode_prompt(tokenizer, "0", 5, 5)
