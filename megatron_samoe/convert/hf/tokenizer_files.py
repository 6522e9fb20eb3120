"""The tokenizer files of an export, as transformers' fast tokenizers want them; and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.hf.sentencepiece_fast import fast_tokenizer, processor_of
from megatron_samoe.datasets.chat_template import GENERATION_CONFIG, TOKENIZER_CONFIG, mapping_in
from megatron_samoe.datasets.tokenizer import MAX_TOKENIZER_BYTES, ByteTokenizer, build_tokenizer
from megatron_samoe.errors import DataError
from megatron_samoe.parsing import parse_json, read_file

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_BYTE_EOD = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of an export.

    Attributes:
        eod: id of the end-of-document token, and eod_name its text.
        files: contents by name.
        notes: lines that a user should know.
        chat: files that came with the tokenizer and say how its model talks, by name (`chat_template.chat_files`).
    """

    eod: int
    eod_name: str
    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    chat: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def token_ids(self) -> dict[str, Any]:
        """Ids of special tokens for config.json: those that came with the tokenizer, else the end of a document."""
        own = {"bos_token_id": self.eod, "eos_token_id": self.eod, "pad_token_id": None}
        given = mapping_in(self.chat, GENERATION_CONFIG)
        return {name: given.get(name, token) for name, token in own.items()}

    def write(self, folder: Path, max_length: int) -> None:
        """Writes the files; `max_length` is the model's longest sequence."""
        for name, content in {**self.files, **self.chat}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        if TOKENIZER not in self.files or TOKENIZER_CONFIG in self.chat:
            return
        # Like ours, it adds no token of its own to a text.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eod_name,
            "bos_token": self.eod_name,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        }
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def tokenizer_files(data: DataConfig) -> TokenizerFiles:
    """Returns the files of a run's tokenizer.

    Raises:
        DataError: the tokenizer is not where the checkpoint says.
    """
    kind = data.tokenizer_type
    if kind == "ByteTokenizer":
        return TokenizerFiles(ByteTokenizer.eod, _BYTE_EOD, {TOKENIZER: _byte_tokenizer().to_str().encode()})
    try:
        ours = build_tokenizer(kind, data.tokenizer_model, data.vocab_file, data.merge_file)
    except DataError as error:
        raise DataError(f"The checkpoint's tokenizer: {error} Give --no-tokenizer to convert without.") from None
    if kind == "SentencePieceTokenizer":
        assert data.tokenizer_model is not None
        return _sentencepiece(data.tokenizer_model, ours.eod)
    tokenizer: Any = ours._tokenizer  # type: ignore[attr-defined]
    name = tokenizer.id_to_token(ours.eod)
    if kind == "GPT2BPETokenizer":
        assert data.vocab_file and data.merge_file
        text = read_file(data.merge_file, MAX_TOKENIZER_BYTES)
        vocabulary = read_file(data.vocab_file, MAX_TOKENIZER_BYTES)
        files = {"vocab.json": vocabulary, "merges.txt": text, TOKENIZER: _json(tokenizer)}
        note = f"{name} in a text is the token for transformers, and plain text for GPT2BPETokenizer."
        return TokenizerFiles(ours.eod, name, files, (note,))
    return TokenizerFiles(ours.eod, name, {TOKENIZER: _json(tokenizer)})


def _json(tokenizer: Any) -> bytes:
    return tokenizer.to_str().encode()


def _byte_tokenizer() -> Any:
    """Returns the 256 bytes and the end of a document as a byte-level BPE without merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_letters_of_bytes(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_BYTE_EOD])
    return tokenizer


def _letters_of_bytes() -> dict[str, int]:
    """Returns GPT-2's letter for each byte: its own where that is printable, else the next one from 256 on."""
    from tokenizers.pre_tokenizers import ByteLevel

    own = {letter: ord(letter) for letter in ByteLevel.alphabet() if ord(letter) < 256}
    others = sorted(set(range(256)).difference(own.values()))
    return own | {chr(256 + number): byte for number, byte in enumerate(others)}


def _sentencepiece(path: str, eod: int) -> TokenizerFiles:
    content = read_file(path, MAX_TOKENIZER_BYTES)
    processor = processor_of(content, path)
    name = processor.id_to_piece(eod)
    fast = fast_tokenizer(content, processor)
    if fast is None:
        note = f"{path} has no equal among fast tokenizers; {SENTENCEPIECE} is copied, to be used with sentencepiece."
        return TokenizerFiles(eod, name, {SENTENCEPIECE: content}, (note,))
    note = f"Control tokens such as {name} in a text are tokens for transformers, and plain text for SentencePiece."
    return TokenizerFiles(eod, name, {SENTENCEPIECE: content, TOKENIZER: _json(fast)}, (note,))


def imported_tokenizer(data: DataConfig, folder: Path, kept_at: Path) -> tuple[DataConfig, str]:
    """Returns the options of an imported model's tokenizer, and a line about it.

    A tokenizer that the options name stays while the folder's tokenizer.json is the one that an export of it writes, or is not
    there. Else the folder's is the one: where a token was added to it, or where a template of chats has texts of special
    tokens, which other types read as plain text.

    Args:
        kept_at: where a copy of tokenizer.json will lie; the options name that.
    """
    plain = replace(data, tokenizer_type="ByteTokenizer", tokenizer_model=None, vocab_file=None, merge_file=None)
    try:
        written = tokenizer_files(data).files.get(TOKENIZER)
    except DataError:
        data, written = plain, None
    if not (folder / TOKENIZER).is_file():
        if data is not plain:
            return data, f"The tokenizer is the one of the run: {data.tokenizer_type}."
        return (
            plain,
            f"There is no {TOKENIZER}: the model comes without its tokenizer; give --tokenizer-type and its files.",
        )
    try:
        given: Any = build_tokenizer("HuggingFaceTokenizer", str(folder / TOKENIZER))
    except DataError as error:
        return data, f"The folder's tokenizer cannot be used: {error}"
    is_same = written is not None and _ids_by(type(given._tokenizer).from_buffer(written)) == _ids_by(given._tokenizer)
    if is_same and not _has_template(folder):
        return data, f"The tokenizer is the one of the run: {data.tokenizer_type}."
    options = replace(plain, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(kept_at))
    return options, f"The tokenizer is the folder's {TOKENIZER}, copied to {kept_at}."


def _ids_by(tokenizer: Any) -> dict[str, Any]:
    """Returns the entries that a text's ids follow from, without special tokens around it, of which transformers writes an empty list."""
    return {name: part for name, part in parse_json(tokenizer.to_str()).items() if name != "post_processor"}


def _has_template(folder: Path) -> bool:
    """Whether a folder has a template of chats: a file of its own, or in older folders an entry."""
    config = folder / TOKENIZER_CONFIG
    return (folder / "chat_template.jinja").is_file() or (config.is_file() and b'"chat_template"' in read_file(config))
