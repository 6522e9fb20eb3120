"""The vocabulary in a GGUF file, for tokenizers that llama.cpp cuts texts for as they do themselves; others are refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.hf.tokenizer_files import TOKENIZER, tokenizer_files
from megatron_samoe.datasets.chat_template import Chat
from megatron_samoe.errors import ConfigError

#: gguf.TokenType, whose six numbers are SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: What SentencePiece does to a text, as steps of a tokenizer.json.
_PREFIX = {"type": "Prepend", "prepend": "\u2581"}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
#: Expressions that cut a text before merging, by llama.cpp's name for them.
_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of a GGUF file.

    Attributes:
        model: of llama.cpp: gpt2 is byte-level BPE, llama is SentencePiece's BPE.
        pre: how a text is cut before merging.
        scores: of SentencePiece's pieces.
        merges: of byte-level BPE.
        space_prefix: whether a space is put before a text.
        template: of conversations, in Jinja.
        end: of an answer; that of a document if not given.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    eod: int
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool = False
    template: str | None = None
    end: int | None = None

    def write(self, writer: Any, vocab_size: int) -> None:
        """Adds it to a GGUF file; entries of the model beyond the tokenizer's are unused."""
        spare = [f"[unused {i}]" for i in range(len(self.tokens), vocab_size)]
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([*self.tokens, *spare][:vocab_size])
        writer.add_token_types([*self.types, *[UNUSED] * len(spare)][:vocab_size])
        if self.scores is not None:
            writer.add_token_scores([*self.scores, *[-1e4] * len(spare)][:vocab_size])
        if self.merges is not None:
            # llama.cpp wants merges; this one joins characters that no text has.
            writer.add_token_merges(self.merges or [f"{self.tokens[self.eod]} {self.tokens[self.eod]}"])
        writer.add_bos_token_id(self.eod)
        writer.add_eos_token_id(self.eod if self.end is None else self.end)
        if self.template is not None:
            writer.add_chat_template(self.template)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.space_prefix)


def vocabulary(data: DataConfig, chat: Chat) -> Vocabulary:
    """Returns the vocabulary of a run's tokenizer, and how its model talks.

    Raises:
        ConfigError: llama.cpp would cut texts otherwise.
        DataError: the tokenizer is not where the checkpoint says.
    """
    files = tokenizer_files(data)  # which says what is wrong with a tokenizer
    if TOKENIZER not in files.files:
        raise _refused(f"{data.tokenizer_model} has no equal among tokenizers of transformers")
    tokenizer = json.loads(files.files[TOKENIZER])
    is_sentencepiece = tokenizer["model"].get("byte_fallback") or tokenizer.get("pre_tokenizer") is None
    made = (_sentencepiece if is_sentencepiece else _byte_level)(tokenizer, files.eod)
    end = chat.tokens.get("eos_token")
    return replace(made, template=chat.template, end=made.tokens.index(end) if end in made.tokens else None)


def _refused(what: str) -> ConfigError:
    return ConfigError(
        "--to", "gguf", f"llama.cpp does not know the tokenizer: {what}. It can be left out with --no-tokenizer"
    )


def _byte_level(tokenizer: dict[str, Any], eod: int) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json."""
    if tokenizer["model"]["type"] != "BPE":
        raise _refused(f"a model of type {tokenizer['model']['type']} (it has BPE)")
    if tokenizer.get("normalizer") is not None:
        raise _refused(f"the normalizer {tokenizer['normalizer']['type']}")
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    return Vocabulary(
        "gpt2", _pre_tokenizer(tokenizer["pre_tokenizer"], bool(merges)), *_tokens(tokenizer), eod, merges=merges
    )


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in tokenizer["model"]["merges"]]


def _tokens(tokenizer: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Returns the tokens of a tokenizer.json and their types, by id."""
    tokens = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = range(max(tokens) + 1)
    return [tokens.get(i, f"[unused {i}]") for i in ids], [types.get(i, UNUSED) for i in ids]


def _sentencepiece(tokenizer: dict[str, Any], eod: int) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json that was a SentencePiece model, as transformers has Llama's.

    llama.cpp joins neighbours whose piece has the highest score; the file joins the pair that comes first in its list.
    """
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise _refused(f"a {model['type']} model without byte fallback (it has BPE with that)")
    steps = normalizer.get("normalizers", [normalizer])
    if steps[-1:] != [_SPACES] or steps[:-1] not in ([], [_PREFIX]) or tokenizer.get("pre_tokenizer") is not None:
        done = ", ".join(step.get("type", "nothing") for step in steps)
        raise _refused(f"what is done to a text before its BPE: {done} (it puts \u2581 for spaces, and one before)")
    (tokens, types), pairs = _tokens(tokenizer), _merges(tokenizer)
    ranks: dict[str, int] = {}
    for left, right in pairs:
        ranks.setdefault(left + right, len(ranks))
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    every = {
        (piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= pieces
    }
    order = [ranks[left + right] for left, right in pairs]
    if set(pairs) != every or order != sorted(order):
        raise _refused("merges other than SentencePiece's (it joins all that make a piece)")
    unknown = model.get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = UNKNOWN
        elif types[i] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, eod, scores=scores, space_prefix=_PREFIX in steps)


def _pre_tokenizer(found: dict[str, Any] | None, merges: bool) -> str:
    """Returns llama.cpp's name of a way to cut texts."""
    steps = [] if found is None else found.get("pretokenizers", [found])
    last = steps[-1] if steps else {"type": "none"}
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _refused(
            f"the pre-tokenizer {last['type']}{' with add_prefix_space' * bool(last.get('add_prefix_space'))}"
        )
    if not merges or (len(steps) == 1 and last["use_regex"]):
        return "gpt-2"  # without merges, where a text is cut changes nothing
    if len(steps) == 2 and steps[0]["type"] == "Split" and not last["use_regex"]:
        split = steps[0]
        pattern = split["pattern"].get("Regex")
        name = next((name for name, known in _SPLITS.items() if known == pattern), None)
        if name is not None and split["behavior"] == "Isolated" and not split["invert"]:
            return name
        raise _refused(f"a pre-tokenizer that cuts by {pattern!r} (it has those of gpt-2, {', '.join(_SPLITS)})")
    raise _refused(
        f"the pre-tokenizer {', '.join(step['type'] for step in steps)} (it has those of gpt-2, {', '.join(_SPLITS)})"
    )
