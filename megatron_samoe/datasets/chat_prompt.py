"""The tokens of a conversation's prompt, in which what users write does not become a control token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import ConfigError

ROLES = ("system", "user", "assistant")
#: Unicode's private characters; two that no message has go around a user's text of a control token.
_PRIVATE = range(0xF0000, 0x110000)


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the ids that a model's answer to messages follows, by the template of its tokenizer.

    The text of a control token within a message, such as <|im_end|>, stays text.

    Args:
        messages: of a "role" (system, user or assistant) and a "content", a text.

    Raises:
        ConfigError: a message is malformed; the model has no template, or it fails (see `Chat.render`); or a message has the text
            of a control token, which the tokenizer cannot read otherwise.
    """
    _check(messages)
    opening, closing = _unused(text for message in messages for text in message.values())
    control = "|".join(map(re.escape, sorted(tokenizer.control_tokens, key=len, reverse=True))) or "(?!)"

    def marked(text: str) -> str:
        return re.sub(control, f"{opening}\\g<0>{closing}", text)

    given = [{name: text if name == "role" else marked(text) for name, text in m.items()} for m in messages]
    # A template may take a message to pieces, and a sign away from its other.
    parts = re.split(f"{opening}({control}){closing}|[{opening}{closing}]", tokenizer.chat.render(given))
    ids = tokenizer.encode_rendered(parts[0])
    for written, after in zip(parts[1::2], parts[2::2], strict=True):
        if written is not None:
            literal = _continued(tokenizer.encode_literally, written)
            if tokenizer.control_tokens[written] in literal:
                told = f"has the text {written}, which this model's tokenizer cannot distinguish from the control token"
                raise ConfigError("messages", messages, told)
            ids += literal
        ids += _continued(tokenizer.encode_rendered, after)
    return ids


def _unused(texts: Iterable[str]) -> list[str]:
    used = set().union(*texts)
    unused = list(islice((sign for sign in map(chr, _PRIVATE) if sign not in used), 2))
    if len(unused) < 2:
        raise ConfigError(
            "messages", f"{len(used):,} different characters", "must leave two of Unicode's private ones unused"
        )
    return unused


def _continued(encode: Any, text: str) -> list[int]:
    """Returns the ids of a text within another one, before whose first word SentencePiece puts no space."""
    before, ids = encode("\n"), encode("\n" + text)
    return ids[len(before) :] if ids[: len(before)] == before else encode(text)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str) or not isinstance(messages, Iterable) or not messages:
        raise ConfigError("messages", messages, 'must be a list such as [{"role": "user", "content": "Hello"}]')
    for message in messages:
        if not isinstance(message, Mapping) or set(message) - {"role", "content", "name"}:
            raise ConfigError("messages", message, 'each must have a "role" and a "content", and may have a "name"')
        if message.get("role") not in ROLES:
            raise ConfigError("messages", message.get("role"), f"a role must be one of {', '.join(ROLES)}")
        for name, text in {"content": None, **message}.items():
            if not isinstance(text, str):
                raise ConfigError("messages", text, f"a {name} must be a text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    "messages", text, f"must be UTF-8 text, and is not at character {error.start}"
                ) from None
