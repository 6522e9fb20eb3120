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

HELLO = [{"role": "user", "content": "Hello"}]
#: Templates, and what the sentence says of them.
HARMFUL = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ messages.__init__.__globals__ }}": "unsafe",
    "{{ raise_exception.__globals__['json'].codecs.sys.modules }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ '%20000000000d' % 1 }}": "MemoryError",
    "{{ 'a' * 10**10 }}": "MemoryError",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}": "MemoryError",
    "{{ 'ab' * 3000000 }}": "4,194,304 are allowed",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "recursion",
    "{{ raise_exception('Only one message.') }}": "fails: Only one message.",
    "{{ x.y.z }}": "'x' is undefined",
    "{% for m in messages %}": "",
    "{{ messages | nothing }}": "No filter named 'nothing'",
    "{{ strftime_now(7) }}": "",
    "{{ 1 / 0 }}": "division by zero",
}


@pytest.mark.parametrize("template", HARMFUL)
def test_a_template_that_fails_is_one_sentence(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
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


def test_any_text_comes_back_from_a_template() -> None:
    said = "é中🚀\u2028\x85\r\n\x1b[2J\0\t{{ 7 }}"
    assert Chat("{{ messages[0].content }}").render([{"role": "user", "content": said}]) == said


@pytest.mark.parametrize("messages", ["Hello", [], None])
def test_what_is_no_list_of_messages_is_named(messages: object) -> None:
    with pytest.raises(ConfigError, match="must be a list"):
        chat_prompt(ByteTokenizer(), messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("Hello", 'each must have a "role"'),
        ({"role": "user", "content": "x", "tool_calls": []}, 'each must have a "role"'),
        ({"role": "robot", "content": "x"}, "a role must be one of system, user, assistant"),
        ({"content": "x"}, "a role must be one of"),
        ({"role": "user"}, "a content must be a text"),
        ({"role": "user", "content": ["x"]}, "a content must be a text"),
        ({"role": "user", "content": "x", "name": 7}, "a name must be a text"),
    ],
)
def test_messages_that_are_none_are_named(message: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        chat_prompt(ByteTokenizer(), [message])


def test_a_base_model_has_no_template() -> None:
    with pytest.raises(ConfigError, match="it is a base model, which continues texts"):
        chat_prompt(ByteTokenizer(), HELLO)


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
