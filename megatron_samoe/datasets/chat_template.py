"""How a model's conversations become text: the files of a Hugging Face folder that say so, and the rendering of its template."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_samoe import children
from megatron_samoe.datasets import render_chat
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.parsing import parse_json, read_file

TEMPLATE, TOKENIZER_CONFIG, GENERATION_CONFIG = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
_NAMES = (TEMPLATE, TOKENIZER_CONFIG, "special_tokens_map.json", GENERATION_CONFIG)
#: Of processor time, in which a template must come to its end.
RENDER_S = 5.0


@dataclass(frozen=True)
class Chat:
    """Chat template and end tokens, from the files next to a tokenizer.

    Attributes:
        template: in Jinja, from messages to a prompt; None for a base model.
        tokens: special tokens by the names that templates have for them, such as eos_token.
        end_ids: tokens that end an answer.
    """

    template: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns the prompt of an answer to messages, in which special tokens are their texts.

        Raises:
            ConfigError: a template is missing; or it refuses the messages, is damaged, or does not end.
        """
        if self.template is None:
            raise ConfigError(
                "messages", messages, "the model has no chat template: it is a base model, which continues texts"
            )
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        answer = _renderer({"template": self.template, "variables": {**self.tokens, **variables}})
        if "text" not in answer:
            raise ConfigError("messages", messages, f"the model's chat template fails: {answer['error']}")
        return answer["text"]


def chat_files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder that say how its model talks, by their path in it; DataError where one cannot be read."""
    paths = [*(folder / name for name in _NAMES), *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    found: dict[str, bytes] = {}
    for path in filter(Path.exists, paths):
        try:
            found[path.relative_to(folder).as_posix()] = read_file(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return found


def read_chat(files: Mapping[str, bytes], folder: str | Path = "") -> Chat:
    """Returns what the files of `chat_files` say.

    Args:
        folder: where they are, for messages.

    Raises:
        DataError: one is damaged.
    """
    older, newer, generation = (
        mapping_in(files, name, folder) for name in (_NAMES[2], TOKENIZER_CONFIG, GENERATION_CONFIG)
    )
    config = {**older, **newer}
    named = config.get("chat_template")
    if isinstance(named, list):  # of several templates, as older versions of transformers write them
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}.get("default")
    if TEMPLATE in files:
        named = files[TEMPLATE].decode(errors="replace")
    if not isinstance(named, str | None):
        raise DataError(f"{Path(folder, TOKENIZER_CONFIG)} is damaged: its chat_template is not text.")
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in config.items() if n.endswith("_token")}
    ends = generation.get("eos_token_id")
    ids = tuple(i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int)
    return Chat(named, {name: text for name, text in texts.items() if isinstance(text, str)}, ids)


def mapping_in(files: Mapping[str, bytes], name: str, folder: str | Path = "") -> dict[str, Any]:
    """Returns the JSON object of a file; an empty one where it is not there. DataError where it holds something else."""
    try:
        content = parse_json(files.get(name, b"{}"))
    except ValueError as error:
        raise DataError(f"{Path(folder, name)} is damaged: it {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{Path(folder, name)} is damaged: it holds no JSON object.")
    return content


class _Renderer:
    """The process of `render_chat`, started when it is needed, and anew after a template that it did not survive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, request: dict[str, Any]) -> dict[str, str]:
        line = ""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._started()
            requests, replies = self._process.stdin, self._process.stdout
            assert requests is not None and replies is not None
            with contextlib.suppress(OSError):  # it has ended
                print(json.dumps({**request, "seconds": RENDER_S}), file=requests, flush=True)
                line = replies.readline()
            if not line:
                self._process.communicate()
                return {
                    "error": f"it has not ended within {RENDER_S:g} s of processor time and {render_chat.MEMORY_BYTES:,} bytes"
                }
        return json.loads(line)

    def _started(self) -> subprocess.Popen[str]:
        # It finds jinja2 where this process does.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return children.start([sys.executable, render_chat.__file__], env=environment, text=True, **pipes)


_renderer = _Renderer()
