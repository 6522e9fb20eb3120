"""What a completion or chat request means, and every way in which one is refused, without a server or a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_samoe.datasets.chat_template import Chat
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.inference.request import TokenEvent, TokenScore
from megatron_samoe.inference.server import chat_protocol
from megatron_samoe.inference.server.answers import ChatAnswers
from megatron_samoe.inference.server.chat_protocol import parse_chat
from megatron_samoe.inference.server.protocol import ApiError, CompletionCall, ModelFacts, parse_body, parse_completion
from tests.harness.tables import table

TABLE = table(__file__, tuples=False)
WORDS = ByteTokenizer()
WORDS.chat = Chat(
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('No no.') }}{% endif %}"
    "{{ m.role[0] }}{{ m.name }}:{{ m.content }};{% endfor %}a:"
)
FACTS = ModelFacts("tiny", WORDS, vocab_size=257, context_length=64, cache_tokens=256, max_choices=6)
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
#: What reads a request, and what each must have.
KINDS: dict[str, tuple[Callable[..., CompletionCall], dict[str, Any]]] = {
    "completions": (parse_completion, {"prompt": "Hi"}),
    "chat": (parse_chat, {"messages": HI}),
}


def refused(kind: str, **fields: Any) -> ApiError:
    parse, needed = KINDS[kind]
    with pytest.raises(ApiError) as caught:
        parse({**needed, **fields}, FACTS)
    assert caught.value.status == 400 and len(caught.value.message) < 700
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_of_all_fields(kind: str) -> None:
    idle = {name: values[-1] for name, values in chat_protocol.UNSUPPORTED.items()} if kind == "chat" else {}
    parse, needed = KINDS[kind]
    call = parse({**needed, **TABLE[kind]["all fields"], **idle}, FACTS)
    prompts = [WORDS.decode(request.prompt_ids) for request in call.requests]
    assert prompts == [{"completions": "Hi", "chat": "u:Hi;a:"}[kind]] * 2 and call.prompt_tokens == len(prompts[0])
    first, second = (request.sampling for request in call.requests)
    assert (first.max_new_tokens, first.temperature, first.top_p, first.top_k) == (5, 0.5, 0.9, 7)
    assert (first.repetition_penalty, first.stop, first.ignore_eod) == (1.2, ("\n", "."), True)
    assert (first.seed, second.seed) == (11, 12) and call.stream and call.include_usage
    assert call.requests[0].logprobs == {"completions": None, "chat": 3}[kind]
    assert call.heads == {"completions": ("Hi", "Hi"), "chat": ("", "")}[kind]


def test_defaults_are_those_of_the_api() -> None:
    (request,) = parse_completion({"prompt": "Hi", "stop": None, "seed": None, "n": None}, FACTS).requests
    options = request.sampling
    assert (options.max_new_tokens, options.temperature, options.top_p, options.top_k) == (16, 1.0, 1.0, 0)
    assert options.stop == () and not options.ignore_eod
    (other,) = parse_completion({"prompt": "Hi"}, FACTS).requests
    assert other.sampling.seed != options.seed, "requests without a seed must not all be alike"


@pytest.mark.parametrize(("prompt", "ids", "num_tokens"), TABLE["prompts"])
def test_prompts_of_every_kind(prompt: Any, ids: list[list[int]], num_tokens: int) -> None:
    call = parse_completion({"prompt": prompt, "echo": True, "n": 2}, FACTS)
    assert [r.prompt_ids for r in call.requests] == [p for p in ids for _ in range(2)]
    assert call.prompt_tokens == num_tokens
    assert call.heads == tuple(WORDS.decode(p) for p in ids for _ in range(2))


def test_messages_of_every_kind() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    told = [
        {"role": "developer", "content": "D"},
        {"role": "user", "name": "Emma", "content": parts},
        {"role": "assistant", "content": "A", **dict.fromkeys(("refusal", "tool_calls", "function_call", "audio"))},
        {"role": "user", "content": ""},
    ]
    (request,) = parse_chat({"messages": told}, FACTS).requests
    assert WORDS.decode(request.prompt_ids) == "s:D;uEmma:a\nb;a:A;u:;a:"


def test_answers_fill_the_context_or_the_cache_and_no_more() -> None:
    def most(kind: str, facts: ModelFacts = FACTS, **fields: Any) -> int:
        parse, needed = KINDS[kind]
        return parse({**needed, **fields}, facts).requests[0].sampling.max_new_tokens

    assert most("completions", prompt="x" * 60, max_tokens=4) == most("completions", prompt="x" * 60) == 4
    assert (most("chat"), most("chat", max_tokens=9)) == (64 - 7, 9)
    # The last token needs no place in the cache.
    assert most("chat", replace(FACTS, cache_tokens=32)) == 32 - 7 + 1
    for fields, param in (
        ({"prompt": "x" * 60, "max_tokens": 5}, "max_tokens"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"prompt": [1] * 1000}, "prompt"),
        ({"prompt": "x" * 65, "max_tokens": 0, "echo": True}, "prompt"),
    ):
        error = refused("completions", **fields)
        assert (error.code, error.param) == ("context_length_exceeded", param) and "64 tokens" in error.message


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in KINDS for field in TABLE[kind]["refused"]])
def test_a_value_that_is_not_allowed_is_named(kind: str, field: str) -> None:
    too_large = [(10**400, "too large")] if kind == "completions" else []
    for value, part in (*TABLE[kind]["refused"][field], *too_large):
        error = refused(kind, **{field: value})
        assert error.param == field and part in error.message, value
        assert kind == "chat" or (field in error.message and len(error.message) < 400)


@pytest.mark.parametrize(("messages", "part"), TABLE["messages"])
def test_messages_that_are_refused(messages: Any, part: str) -> None:
    error = refused("chat", messages=messages)
    assert part in error.message and error.param in ("messages", "tool_calls", "tool_call_id")


def test_two_names_of_one_limit_must_agree() -> None:
    error = refused("chat", max_tokens=5, max_completion_tokens=6)
    assert error.message == "max_tokens = 5: is another name of max_completion_tokens, which is 6: give one of them."


@pytest.mark.parametrize("field", TABLE["completions"]["unsupported"])
def test_a_field_without_code_behind_it_is_refused(field: str) -> None:
    for value in TABLE["completions"]["unsupported"][field]:
        error = refused("completions", **{field: value})
        assert (error.param, error.code) == (field, "unsupported_field"), value


def test_a_mistyped_field_is_refused_with_the_nearest_name() -> None:
    error = refused("completions", max_token=5)
    assert error.code == "unknown_field" and "Did you mean 'max_tokens'?" in error.message
    assert len(refused("completions", **{"x" * 10**6: 5}).message) < 400


def test_every_field_of_openais_schema_works_or_is_refused_by_name() -> None:
    create = pytest.importorskip("openai").types.chat.completion_create_params
    known = {
        *create.CompletionCreateParamsBase.__annotations__,
        *create.CompletionCreateParamsStreaming.__annotations__,
    }
    assert {"messages", "stream", "tools"} <= known
    assert not known - {*chat_protocol.FIELDS, *chat_protocol.UNSUPPORTED}


def test_any_value_in_any_field_is_an_answer_or_a_sentence() -> None:
    numbers, texts = [True, -1, 0, 1.5, 1e308, 10**400], ["", "x", "\ud800"]
    odd = [None, *numbers, *texts, [], [[1]], [None], [{}], {}, {"a": {}}, {"type": "text"}]
    for field in (*chat_protocol.FIELDS, *chat_protocol.UNSUPPORTED, "other"):
        for value in odd:
            for body in ({"messages": HI, field: value}, {"messages": [{**HI[0], field: value}]}):
                try:
                    assert isinstance(parse_chat(body, FACTS), CompletionCall)
                except ApiError as error:
                    assert error.status == 400 and "\n" not in error.message and json.dumps(error.body)


def test_a_token_within_a_character_has_no_bytes() -> None:
    call = parse_chat({"messages": HI, "logprobs": True, "top_logprobs": 2}, FACTS)
    top = ((195, -0.5), (97, -1.0))
    found = ChatAnswers(call, "tiny", WORDS, 0).logprobs(0, TokenEvent(0, 97, None, "a", TokenScore(97, -1.0, top)))
    tokens = [("\ufffd", -0.5, None), ("a", -1.0, [97])]
    likely, made = ({"token": text, "logprob": logprob, "bytes": data} for text, logprob, data in tokens)
    assert found == {"content": [{**made, "top_logprobs": [likely, made]}]}


@pytest.mark.parametrize(
    "raw",
    [*map(str.encode, TABLE["no object"]), b'{"prompt": "\xff"}', b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000],
)
def test_a_body_that_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(raw)
    assert caught.value.status == 400 and "JSON" in caught.value.message
    json.dumps(caught.value.body)
