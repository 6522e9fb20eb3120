"""Chat templates of strangers: none runs code, and whatever fails or does not end is one sentence."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.datasets import chat_template
from megatron_samoe.datasets.chat_prompt import chat_prompt
from megatron_samoe.datasets.chat_template import Chat, chat_files, read_chat
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.errors import ConfigError, DataError
from tests.harness.tables import table

HELLO = [{"role": "user", "content": "Hello"}]
TABLE = table(__file__, tuples=False)
#: Templates, and what the sentence says of them.
HARMFUL: dict[str, str] = TABLE["harmful"]


@pytest.mark.parametrize("template", HARMFUL)
def test_a_template_that_fails_is_one_sentence(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_template, "RENDER_S", 60.0)  # a busy machine may need seconds to use all memory
    with pytest.raises(ConfigError, match="the model's chat template fails: ") as caught:
        Chat(template).render(HELLO)
    assert HARMFUL[template] in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())
    assert Chat("{{ messages[0].content }}").render(HELLO) == "Hello", "the next template is not harmed"


@pytest.mark.parametrize("template", ["{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "{{ 9 ** (9 ** 9) }}"])
def test_a_template_that_does_not_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Chat("warm").render(HELLO) == "warm"
    monkeypatch.setattr(chat_template, "RENDER_S", 0.5)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"it has not ended within 0\.5 s of processor time"):
        Chat(template).render(HELLO)
    assert time.monotonic() - started < 60
    monkeypatch.undo()
    assert Chat("{{ messages[0].role }}").render(HELLO) == "user"


@pytest.mark.parametrize(
    "inside", ["self._TemplateReference__context", "self.__class__", "namespace().__init__", "messages.__len__"]
)
def test_a_templates_own_objects_show_nothing(inside: str) -> None:
    try:
        assert Chat("{{ " + inside + " }}").render(HELLO) == ""
    except ConfigError as error:
        assert "unsafe" in str(error)


def test_the_process_of_templates_may_die_between_two_of_them() -> None:
    assert Chat("a").render(HELLO) == "a"
    process = chat_template._renderer._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    assert Chat("b").render(HELLO) == "b"


@pytest.mark.parametrize(
    ("messages", "part"),
    [*((none, "must be a list") for none in ("Hello", [], None)), *(([one], part) for one, part in TABLE["messages"])],
)
def test_messages_that_are_none_are_named(messages: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        chat_prompt(ByteTokenizer(), messages)


def test_bytes_know_their_control_token_from_its_text() -> None:
    words = ByteTokenizer()
    words.chat = Chat("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    said = "a<|endoftext|>b"
    assert chat_prompt(words, [{"role": "user", "content": said}]) == [*said.encode(), 256]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 7}'),
        ("generation_config.json", b"\xff"),
        ("special_tokens_map.json", b"[" * 100_000),
        ("generation_config.json", b'"\\ud800"'),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / name} is damaged: "):
        read_chat(chat_files(tmp_path), tmp_path)


def test_odd_values_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, "x", true, null, 7]}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "</s>"}, "bos_token": null, "pad_token": 7}'
    )
    assert read_chat(chat_files(tmp_path)) == Chat(None, {"eos_token": "</s>"}, (1, 7))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(DataError, match=f"^{tmp_path / 'generation_config.json'} cannot be read: Is a directory"):
        chat_files(tmp_path)
