"""Tokenizers: round trips, equal ids on the fast engine, refusals."""

from __future__ import annotations

import base64
import contextlib
import json
import string
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_samoe.cli.train_tokenizer import main
from megatron_samoe.datasets.byte_bpe import tiktoken_encoding
from megatron_samoe.datasets.tokenizer import Tokenizer, build_tokenizer
from megatron_samoe.errors import DataError
from tests.harness.tables import table

TABLE = table(__file__)

CORPUS = Path(__file__).resolve().parents[3] / "megatron_samoe/cli/quickstart_data/austen_emma_mansfield.txt"
RELAXED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Text that meets every branch of the splitting pattern, and all of Unicode.
AWKWARD = st.text(
    st.sampled_from("  \n\t\r\u3000\u00a0'sdtlmve|<>endoftext" + string.printable) | st.characters(codec="utf-8"),
    max_size=60,
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of small trained tokenizers."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "part.txt").write_text(CORPUS.read_text()[:200_000])
    for kind in ("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"):
        words = ["--type", kind, "--input", str(folder / "part.txt"), "--vocab-size", "700", "--num-threads", "1"]
        assert main([*words, "--output-prefix", str(folder / kind)]) == 0
    return folder


@pytest.fixture(scope="session")
def tokenizers_by_name(trained: Path) -> dict[str, Tokenizer]:
    bpe = f"{trained}/byte-bpe"
    return {
        "ByteTokenizer": build_tokenizer("ByteTokenizer"),
        "bpe": build_tokenizer("SentencePieceTokenizer", f"{trained}/sentencepiece-bpe.model"),
        "unigram": build_tokenizer("SentencePieceTokenizer", f"{trained}/sentencepiece-unigram.model"),
        "hf": build_tokenizer("HuggingFaceTokenizer", f"{bpe}.json"),
        "gpt2": build_tokenizer("GPT2BPETokenizer", None, f"{bpe}-vocab.json", f"{bpe}-merges.txt"),
    }


NAMES = ("ByteTokenizer", "bpe", "unigram", "hf", "gpt2")


@pytest.mark.parametrize("name", NAMES)
@RELAXED
@given(text=AWKWARD)
def test_round_trip(tokenizers_by_name: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers_by_name[name]
    if name in ("bpe", "unigram"):
        text = text.replace("\u2581", "").replace("\0", "")  # SentencePiece's own sign for a space, and its end of text
    ids = tokenizer.encode(text)
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert tokenizer.decode(ids) == text
    flat, lengths = tokenizer.encode_arrays([text, "", "x", text])
    assert flat.dtype == np.int32 and lengths.tolist() == [len(ids), 0, len(tokenizer.encode("x")), len(ids)]
    assert flat.tolist() == ids + tokenizer.encode("x") + ids
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


@pytest.mark.parametrize("name", NAMES)
def test_facts(tokenizers_by_name: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers_by_name[name]
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.eod not in tokenizer.encode("Emma Woodhouse, handsome, clever, and rich")
    assert len({t.fingerprint for t in tokenizers_by_name.values()}) == len(NAMES)
    assert tokenizer.vocab_size == (257 if name == "ByteTokenizer" else 700)


def test_end_of_document_inside_a_text(tokenizers_by_name: dict[str, Tokenizer]) -> None:
    hf, gpt2 = tokenizers_by_name["hf"], tokenizers_by_name["gpt2"]
    assert hf.encode("a<|endoftext|>b").count(hf.eod) == 1, "as the tokenizers library reads it"
    assert gpt2.eod not in gpt2.encode("a<|endoftext|>b"), "text stays text"


@RELAXED
@given(text=AWKWARD)
def test_the_fast_engine_gives_the_same_ids(tokenizers_by_name: dict[str, Tokenizer], text: str) -> None:
    for name in ("hf", "gpt2"):
        tokenizer = tokenizers_by_name[name]
        assert tokenizer.engine == "tiktoken"  # type: ignore[attr-defined]
        slow = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
        assert tokenizer.encode(text) == slow


def test_the_fast_engine_on_the_novels_and_on_all_of_unicode(tokenizers_by_name: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_name["hf"]
    points = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    texts = [CORPUS.read_text()[:300_000]]
    texts += ["".join(f" a{c}1 {c}{c}b" for c in points[start : start + 4096]) for start in range(0, len(points), 4096)]
    for text in texts[:1] + texts[1::4]:
        slow = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
        assert tokenizer.encode(text) == slow


def test_a_million_spaces(tokenizers_by_name: dict[str, Tokenizer]) -> None:
    for end in ("", "x"):
        ids = tokenizers_by_name["hf"].encode(" " * 1_000_000 + end)
        assert tokenizers_by_name["hf"].decode(ids) == " " * 1_000_000 + end


def _tokenizer(vocab: list[str], merges: list[tuple[str, str]], **options: object) -> object:
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    table = {token: number for number, token in enumerate([*alphabet, *vocab])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=table, merges=merges, **options))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return made


def test_a_vocabulary_on_which_the_engines_differ_stays_on_the_slow_one() -> None:
    # "abc" is listed as ab + c, but (bc) is merged first: tiktoken would join a + bc, `tokenizers` does not.
    differs = _tokenizer(["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")])
    assert tiktoken_encoding(differs) is None
    assert len(differs.encode("abc").ids) == 2  # type: ignore[attr-defined]
    agrees = _tokenizer(["ab", "abc"], [("a", "b"), ("ab", "c")])
    assert tiktoken_encoding(agrees) is not None
    assert tiktoken_encoding(_tokenizer(["ab", "bc"], [("b", "c"), ("a", "b")])) is None, "ids against the merge order"
    assert tiktoken_encoding(_tokenizer(["ab"], [("a", "b")], dropout=0.1)) is None
    normalized = _tokenizer(["ab"], [("a", "b")])
    import tokenizers

    normalized.normalizer = tokenizers.normalizers.Lowercase()  # type: ignore[attr-defined]
    assert tiktoken_encoding(normalized) is None


@RELAXED
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=14), st.text("abcd", max_size=30)
)
def test_whenever_the_fast_engine_is_chosen_ids_are_equal(pairs: list[tuple[int, int]], text: str) -> None:
    """Random merge lists over four letters, most of them ambiguous."""
    tokens, merges = list("abcd"), []
    for left, right in pairs:
        x, y = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if x + y not in tokens and len(x + y) <= 8:
            tokens.append(x + y)
            merges.append((x, y))
    tokenizer = _tokenizer(tokens[4:], merges)
    fast = tiktoken_encoding(tokenizer)
    if fast is not None:
        assert fast.encode_ordinary(text) == tokenizer.encode(text).ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_files_that_are_no_tokenizers(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model").write_bytes(b"nonsense")
    for words, said in (
        ((kind, str(tmp_path / "model")), "is not a"),
        ((kind, str(tmp_path / "modell")), "Did you mean 'model'"),
        ((kind,), "needs --tokenizer-model"),
        (("BytTokenizer",), "Did you mean 'ByteTokenizer'"),
    ):
        with pytest.raises(DataError, match=said):
            build_tokenizer(*words)


def test_gpt2_files_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "m.txt").write_text("x y\n")
    with pytest.raises(DataError, match="not a GPT-2 vocabulary"):
        build_tokenizer("GPT2BPETokenizer", None, str(tmp_path / "v.json"), str(tmp_path / "m.txt"))
    (tmp_path / "m.txt").write_text("")
    with pytest.raises(DataError, match="no end-of-document token"):
        build_tokenizer("GPT2BPETokenizer", None, str(tmp_path / "v.json"), str(tmp_path / "m.txt"))


def test_training_refuses_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello world\n")
    words = ["--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "t")]
    for kind, size, message in TABLE["sizes"]:
        assert main(["--type", kind, "--vocab-size", size, *words]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("")
    assert main(["--type", "byte-bpe", "--vocab-size", "300", *words]) == 1
    assert "empty" in capsys.readouterr().err
    assert not list(tmp_path.glob("t*.json"))


def test_fewer_entries_than_asked_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("It was a fine day, and a finer night was to come of it.\n" * 40)
    for kind, size in (("byte-bpe", 260), ("sentencepiece-bpe", 300), ("byte-bpe", 5000)):
        words = f"--type {kind} --input {tmp_path}/text.txt --vocab-size {size} --output-prefix {tmp_path}/tok"
        assert main([*words.split(), "--num-threads", "1", "--overwrite"]) == 0
        said = capsys.readouterr().out
        if size < 5000:
            assert f": {size} entries" in said and "note" not in said
    made = len(json.loads((tmp_path / "tok-vocab.json").read_text()))
    assert 260 < made < 5000 and f"tok.json: {made:,} entries" in said
    assert "note: 5,000 were asked for" in said and "more text gives more" in said


def test_a_file_for_another_type_of_tokenizer_is_recognised(trained: Path) -> None:
    """Each type is given each file that the libraries write."""
    files = {
        "SentencePieceTokenizer": "sentencepiece-bpe.model",
        "HuggingFaceTokenizer": "byte-bpe.json",
        "GPT2BPETokenizer": "byte-bpe-vocab.json",
    }
    for wanted, (right, name) in product(files, files.items()):
        if wanted != right:
            path = str(trained / name)
            given = [None, path, path] if wanted == "GPT2BPETokenizer" else [path]
            with pytest.raises(DataError, match=rf"{name}.* It looks like a file for --tokenizer-type {right}\."):
                build_tokenizer(wanted, *given)


def _with_parts(path: Path, **parts: object) -> str:
    """Writes a tokenizer.json of single bytes with a normalizer, pre-tokenizer or decoder, and returns its path."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "<eod>": 2}, merges=[]))
    content = json.loads(tokenizer.to_str()) | parts
    path.write_text(json.dumps(content))
    return str(path)


def _replace(content: str, **pattern: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLES = _replace("aa", String="a")


@pytest.mark.parametrize(
    ("part", "steps", "growth"),
    [
        ("normalizer", [DOUBLES] * 60, 2**60),
        ("normalizer", [{"type": "Sequence", "normalizers": [DOUBLES] * 6}] * 2, 2**12),
        ("normalizer", [_replace("b" * 2000, Regex="a+")], 2000),
        ("normalizer", [_replace("bbb", Regex="x*")] * 10, 4**10),
        ("normalizer", [{"type": "Prepend", "prepend": "b" * 1999}], 2000),
        ("decoder", [DOUBLES] * 11, 2**11),
    ],
)
def test_a_tokenizer_that_makes_very_much_of_a_text_is_refused(
    part: str, steps: list[object], growth: int, tmp_path: Path
) -> None:
    key = f"{part}s"
    path = _with_parts(tmp_path / "tokenizer.json", **{part: {"type": "Sequence", key: steps}})
    with pytest.raises(DataError, match=rf"tokenizer.json: its {part} can make {growth:,} characters of one"):
        build_tokenizer("HuggingFaceTokenizer", path)


def test_replacements_that_tokenizers_have_are_read(tmp_path: Path) -> None:
    """A text becomes twice as long at most by each, and the library's own result says so."""
    steps = [
        _replace("\u2581", String=" "),
        *([_replace("b", Regex="c{2,}")] * 20),
        {"type": "Prepend", "prepend": "\u2581"},
    ]
    path = _with_parts(tmp_path / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert build_tokenizer("HuggingFaceTokenizer", path).encode("aba") == [0, 1, 0]


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_regular_expression_that_takes_for_ever_is_an_error(part: str, tmp_path: Path) -> None:
    """The library gives up and panics, which is not even an Exception."""
    slow = {"Regex": "(a+)+$"}
    parts = {
        "normalizer": {"type": "Replace", "pattern": slow, "content": "b"},
        "pre_tokenizer": {"type": "Split", "pattern": slow, "behavior": "Isolated", "invert": False},
    }
    tokenizer = build_tokenizer("HuggingFaceTokenizer", _with_parts(tmp_path / "t.json", **{part: parts[part]}))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match=r"The tokenizer cannot encode a text: .*retry-limit"):
            encode("a" * 60 + "!")


@pytest.mark.parametrize(
    ("packed", "is_sound"),
    [
        (b"\xff\xff\xff\x0b" + bytes(300), False),
        (b"\x08", False),
        (b"\x05\0\0\0" + bytes(8), False),
        (b"\x08\0\0\0" + bytes(9), True),
    ],
)
def test_a_map_of_characters_that_lies_is_refused(packed: bytes, is_sound: bool, tmp_path: Path) -> None:
    """By itself the library ends the process."""
    part = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(packed).decode()}
    path = _with_parts(tmp_path / "tokenizer.json", normalizer=part)
    said = r"tokenizer\.json is damaged: its precompiled_charsmap is shorter than it says"
    with contextlib.nullcontext() if is_sound else pytest.raises(DataError, match=said):
        assert build_tokenizer("HuggingFaceTokenizer", path).vocab_size == 3


def test_a_vocabulary_with_a_token_twice_is_read_by_the_library(tmp_path: Path) -> None:
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words of a text"] * 3, vocab_size=270, special_tokens=["<eod>"], show_progress=False)
    bpe.save(str(tmp_path / "tokenizer.json"))
    text = (tmp_path / "tokenizer.json").read_text()
    vocab = json.loads(text)["model"]["vocab"]
    one, other = list(vocab)[-2:]
    (tmp_path / "tokenizer.json").write_text(text.replace(json.dumps(other), json.dumps(one), 1))
    with contextlib.suppress(DataError):  # the library may refuse it
        ours = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert ours.encode("some words") == theirs.encode("some words", add_special_tokens=False).ids
