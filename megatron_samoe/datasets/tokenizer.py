"""Tokenizers behind one small interface, each on its fastest engine.

Types carry Megatron's names: SentencePieceTokenizer, HuggingFaceTokenizer (a tokenizer.json), GPT2BPETokenizer
(vocab.json + merges.txt) and ByteTokenizer.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_samoe.datasets.chat_template import Chat, chat_files, read_chat
from megatron_samoe.errors import DataError, nearest, nearest_file, readable
from megatron_samoe.parsing import parse_json, read_file

EOD_NAMES = ("<|endoftext|>", "<eod>", "<|eod|>", "<EOD>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


#: Of a file: the largest vocabularies have some 40 MB.
MAX_TOKENIZER_BYTES = 1 << 28
#: Characters that one may become.
_MAX_GROWTH = 1000


#: Ids of several texts joined (int32), and how many each has (int64).
JoinedIds = tuple[np.ndarray, np.ndarray]


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: entries, not padded; ids are below it.
        eod: id of the end-of-document token.
        fingerprint: hash of everything that decides the ids.
        folder: of the files that say how its model talks; None for a model that does not.
    """

    vocab_size: int
    eod: int
    fingerprint: str
    folder: Path | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; no special token is added."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Tokens that mark the parts of a conversation, by the texts that chat templates have for them."""
        return {}

    @cached_property
    def chat(self) -> Chat:
        """How the tokenizer's model talks; DataError where a file of `folder` is damaged."""
        return Chat() if self.folder is None else read_chat(chat_files(self.folder), self.folder)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: of the document, and those that the files next to the tokenizer name."""
        named = self.control_tokens.get(self.chat.tokens.get("eos_token", ""), self.eod)
        return frozenset({self.eod, named, *self.chat.end_ids})

    def encode_literally(self, text: str) -> list[int]:
        """Returns the ids of a text in which texts of control tokens are plain text, where the tokenizer can do so."""
        return self.encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of a text in which texts of control tokens are these tokens."""
        parts = re.split(f"({'|'.join(map(re.escape, self.control_tokens)) or '(?!)'})", text)
        own = self.control_tokens
        return [i for part in parts if part for i in ([own[part]] if part in own else self.encode(part))]

    def __repr__(self) -> str:
        chat = "" if self.chat.template is None else ", a chat template"
        return f"{type(self).__name__}({self.vocab_size:,} tokens, end of a document {self.eod}{chat})"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> JoinedIds:
        """Returns (ids of all texts joined, ids per text), int32 and int64: what the preprocessor writes."""
        rows = self.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum())), lengths


def _join(rows: list[np.ndarray]) -> JoinedIds:
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    ids = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
    return ids.astype(np.int32, copy=False), lengths


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 as the end of a document."""

    vocab_size = 257
    eod = 256
    control_tokens = {"<|endoftext|>": eod}  # noqa: RUF012
    fingerprint = hashlib.sha256(b"ByteTokenizer").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def encode_arrays(self, texts: Sequence[str]) -> JoinedIds:
        return _join([np.frombuffer(text.encode(), dtype=np.uint8) for text in texts])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (unigram or BPE); the end of a document is <eod> or the like if it has one, else </s>."""

    def __init__(self, model: str):
        import sentencepiece

        content = _read(model, "--tokenizer-model")
        try:
            if not content:
                raise RuntimeError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = int(self._processor.vocab_size())
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{model} is not a SentencePiece model: {error}.{_other_type(content, 'SentencePieceTokenizer')}"
            ) from error
        self.fingerprint = hashlib.sha256(b"SentencePieceTokenizer\0" + content).hexdigest()
        named = [self._processor.piece_to_id(name) for name in EOD_NAMES]
        candidates = [i for i in named if i >= 0 and i != self._processor.unk_id()] + [self._processor.eos_id()]
        self.eod = candidates[0]
        if self.eod < 0:
            raise DataError(f"{model} has no end-of-document token; one of {', '.join(EOD_NAMES)} is needed.")
        self.folder = Path(model).parent

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        control = [i for i in range(self.vocab_size) if i == self.eod or self._processor.is_control(i)]
        return {self._processor.id_to_piece(i): i for i in control}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def encode_arrays(self, texts: Sequence[str]) -> JoinedIds:
        if not texts or not hasattr(self._processor, "encode_as_numpy"):  # sentencepiece before 0.2.2
            return super().encode_arrays(texts)
        return _join(self._processor.encode_as_numpy(list(texts), num_threads=1))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library; byte-level BPE runs on tiktoken's engine if ids are identical."""

    def __init__(self, path: str):
        import tokenizers

        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        content = _read(path, "--tokenizer-model")
        _refuse_lying_map(content, path)
        with _library_errors(
            lambda e: f"{path} is not a tokenizer.json: {e}.{_other_type(content, 'HuggingFaceTokenizer')}"
        ):
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._start(tokenizer, hashlib.sha256(b"HuggingFaceTokenizer\0" + content).hexdigest(), path)

    # Whether the text <|endoftext|> stands for the token, as the `tokenizers` library reads it.
    _specials_in_text = True

    def _start(self, tokenizer: Any, fingerprint: str, shown: str) -> None:
        from megatron_samoe.datasets.byte_bpe import tiktoken_encoding

        for part in ("normalizer", "decoder"):
            if (growth := _growth(_description(getattr(tokenizer, part)))) > _MAX_GROWTH:
                raise DataError(
                    f"{shown}: its {part} can make {growth:,.0f} characters of one, and {_MAX_GROWTH:,} are allowed: a line of text "
                    "would fill the memory."
                )
        self._tokenizer, self.fingerprint, self.folder = tokenizer, fingerprint, Path(shown).parent
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have holes; what counts is the largest.
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > 4 * len(vocab) + 100_000:
            raise DataError(f"{shown} has {len(vocab)} tokens and the id {self.vocab_size - 1}, which is damage.")
        found = [vocab[name] for name in EOD_NAMES if name in vocab]
        if not found:
            raise DataError(f"{shown} has no end-of-document token; one of {', '.join(EOD_NAMES)} is needed.")
        self.eod = found[0]
        self._fast = tiktoken_encoding(tokenizer)

    @property
    def engine(self) -> str:
        """Returns "tiktoken" or "tokenizers"."""
        return "tiktoken" if self._fast is not None else "tokenizers"

    def _encode_fast(self, text: str) -> np.ndarray:
        """Returns the ids of a text from tiktoken's engine, uint32."""
        assert self._fast is not None
        try:
            specials: Any = "all" if self._specials_in_text else set()
            return self._fast.encode_to_numpy(text, allowed_special=specials, disallowed_special=())
        except ValueError:
            # Its regular expressions give up on about a million white-space characters in a row.
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode(self, text: str) -> list[int]:
        if self._fast is not None:
            return self._encode_fast(text).tolist()
        with _cannot_encode():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        template, added = self.chat.template or "", self._tokenizer.get_added_tokens_decoder()
        used = {t.content: i for i, t in added.items() if t.special or (t.content in template and t.content.strip())}
        return {self._tokenizer.id_to_token(self.eod): self.eod, **used}

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text) if self._specials_in_text else super().encode_rendered(text)

    def encode_literally(self, text: str) -> list[int]:
        steps = self._tokenizer  # which looks for added tokens before its steps
        with _cannot_encode():
            text = text if steps.normalizer is None else steps.normalizer.normalize_str(text)
            cut = steps.pre_tokenizer.pre_tokenize_str(text) if steps.pre_tokenizer else [(text, None)]
            return [token.id for part, _ in cut for token in steps.model.tokenize(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast is not None:
            return super().encode_batch(texts)
        with _cannot_encode():
            return [row.ids for row in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> JoinedIds:
        if self._fast is None:
            return super().encode_arrays(texts)
        return _join([self._encode_fast(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """GPT-2's format: a vocabulary (JSON) and merges. `<|endoftext|>` inside a text is text, not the token."""

    _specials_in_text = False

    def __init__(self, vocab_file: str, merge_file: str):
        import json

        import tokenizers

        vocab_bytes, merge_bytes = _read(vocab_file, "--vocab-file"), _read(merge_file, "--merge-file")
        wrong = f"{vocab_file} and {merge_file} are not a GPT-2 vocabulary and merges"
        with _library_errors(lambda e: f"{wrong}: {e}.{_other_type(vocab_bytes, 'GPT2BPETokenizer')}"):
            vocab = json.loads(vocab_bytes)
            lines = [line for line in merge_bytes.decode().split("\n") if line and not line.startswith("#version")]
            merges = [tuple(line.rstrip("\r").split(" ", 2)) for line in lines]
            model = tokenizers.models.BPE(vocab=vocab, merges=merges)  # type: ignore[arg-type]
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        digest = hashlib.sha256(b"GPT2BPETokenizer\0" + vocab_bytes + b"\0" + merge_bytes).hexdigest()
        self._start(tokenizer, digest, vocab_file)


#: Types by name, and the files that they need.
_TYPES: dict[str, tuple[Callable[..., Tokenizer], tuple[str, ...]]] = {
    "SentencePieceTokenizer": (SentencePieceTokenizer, ("--tokenizer-model",)),
    "HuggingFaceTokenizer": (HuggingFaceTokenizer, ("--tokenizer-model",)),
    "GPT2BPETokenizer": (GPT2BPETokenizer, ("--vocab-file", "--merge-file")),
    "ByteTokenizer": (ByteTokenizer, ()),
}
TOKENIZER_TYPES = tuple(_TYPES)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a type; DataError if its files are missing or of another kind."""
    if tokenizer_type not in _TYPES:
        raise DataError(
            f"--tokenizer-type {tokenizer_type!r} is not known; allowed are {', '.join(TOKENIZER_TYPES)}."
            + nearest(tokenizer_type, TOKENIZER_TYPES)
        )
    kind, needed = _TYPES[tokenizer_type]
    given = {"--tokenizer-model": tokenizer_model, "--vocab-file": vocab_file, "--merge-file": merge_file}
    for flag in needed:
        if not given[flag]:
            raise DataError(f"{tokenizer_type} needs {flag}.")
    return kind(*(given[flag] for flag in needed))


def tokenizer_of(named: Any) -> Tokenizer:
    """Returns the tokenizer that options or a configuration name, which have the fields of `build_tokenizer`."""
    return build_tokenizer(named.tokenizer_type, named.tokenizer_model, named.vocab_file, named.merge_file)


@contextlib.contextmanager
def _library_errors(message: Callable[[str], str]) -> Iterator[None]:
    """Raises DataError, with a message by the reason, where `tokenizers` raises a bare Exception or panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(message(readable(" ".join(str(error).split())).rstrip("."))) from None


def _cannot_encode() -> contextlib.AbstractContextManager[None]:
    """Returns `_library_errors` of a text, such as for an unknown token that is not there."""
    return _library_errors(lambda error: f"The tokenizer cannot encode a text: {error}.")


def _refuse_lying_map(content: bytes, path: str) -> None:
    """Raises DataError where a tokenizer.json has a map of characters that is shorter than it says: the library would take the
    memory that it asks for, or end the process.

    The map is SentencePiece's: the bytes of a trie as four bytes, the trie, and what characters become.
    """
    for encoded in re.findall(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"', content):
        try:
            packed = base64.b64decode(encoded)
        except ValueError:
            packed = b""
        size = int.from_bytes(packed[:4], "little")
        if encoded and (len(packed) < 4 or size % 4 or 4 + size > len(packed)):
            raise DataError(f"{path} is damaged: its precompiled_charsmap is shorter than it says.")


def _description(part: Any) -> Any:
    """Returns what a tokenizer.json says of a normalizer or decoder; None without one."""
    return None if part is None else parse_json(part.__getstate__())


def _growth(step: Any) -> float:
    """Returns how many characters a normalizer or decoder of a tokenizer.json can make of one."""
    if not isinstance(step, dict):
        return 1.0
    if steps := step.get("normalizers") or step.get("decoders"):
        return math.prod(map(_growth, steps))
    if step.get("type") == "Prepend":
        return 1.0 + len(step["prepend"])
    if step.get("type") != "Replace":
        return 1.0
    pattern, content = step["pattern"], len(step["content"])
    if "String" in pattern:
        return max(1.0, content / max(1, len(pattern["String"])))
    with contextlib.suppress(re.error):
        if re.match(pattern["Regex"], ""):  # it is also between any two characters
            return 1.0 + content
    return max(1.0, content)


def _other_type(content: bytes, wanted: str) -> str:
    """Returns a sentence about the type of tokenizer that a file is of, by its first bytes; empty where it is not another."""
    head = content[:4096].lstrip()
    if content.startswith(b"\n") and b"<unk>" in head:  # the first field of a protocol buffer: a piece
        found = "SentencePieceTokenizer"
    elif head.startswith(b"{"):
        is_whole = re.search(rb'"(version|added_tokens|truncation|model)"\s*:', head)
        found = "HuggingFaceTokenizer" if is_whole else "GPT2BPETokenizer"
    else:
        return ""
    return "" if found == wanted else f" It looks like a file for --tokenizer-type {found}."


def _read(path: str, flag: str) -> bytes:
    try:
        return read_file(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise DataError(f"{flag} {path!r} cannot be read: {error.strerror}.{nearest_file(path)}") from error
