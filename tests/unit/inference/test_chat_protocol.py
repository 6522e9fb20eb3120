"""What a chat request means, and every way in which one is refused, without a server or a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_samoe.datasets.chat_template import Chat
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.inference.request import TokenEvent, TokenScore
from megatron_samoe.inference.server.answers import ChatAnswers
from megatron_samoe.inference.server.chat_protocol import FIELDS, UNSUPPORTED, parse_chat
from megatron_samoe.inference.server.protocol import ApiError, CompletionCall, ModelFacts

WORDS = ByteTokenizer()
WORDS.chat = Chat(
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('No no.') }}{% endif %}"
    "{{ m.role[0] }}{{ m.name }}:{{ m.content }};{% endfor %}a:"
)
FACTS = ModelFacts("tiny", WORDS, vocab_size=257, context_length=64, cache_tokens=256, max_choices=6)
HI = [{"role": "user", "content": "Hi"}]


def prompt(messages: Any, **body: Any) -> str:
    return WORDS.decode(parse_chat({"messages": messages, **body}, FACTS).requests[0].prompt_ids)


def refused(body: dict[str, Any], facts: ModelFacts = FACTS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(body, facts)
    assert caught.value.status == 400 and len(caught.value.message) < 700
    return caught.value


def test_a_request_of_all_fields() -> None:
    call = parse_chat(
        {
            "model": "tiny", "messages": HI, "max_completion_tokens": 5, "max_tokens": 5, "n": 2, "temperature": 0.5,
            "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.2, "stop": ["\n"], "seed": 11, "logprobs": True, "top_logprobs": 3,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "user": "me",
            "safety_identifier": "me", "prompt_cache_key": "here", **{name: idle[-1] for name, idle in UNSUPPORTED.items()},
        },
        FACTS,
    )  # fmt: skip
    first, second = call.requests
    assert WORDS.decode(first.prompt_ids) == "u:Hi;a:" and call.prompt_tokens == 7
    options = first.sampling
    assert (options.max_new_tokens, options.temperature, options.top_p, options.top_k) == (5, 0.5, 0.9, 7)
    assert (options.repetition_penalty, options.stop, options.ignore_eod, first.logprobs) == (1.2, ("\n",), True, 3)
    assert (options.seed, second.sampling.seed) == (11, 12) and call.stream and call.include_usage


def test_an_answer_may_go_on_to_the_end_of_the_context_or_of_the_cache() -> None:
    assert parse_chat({"messages": HI}, FACTS).requests[0].sampling.max_new_tokens == 64 - 7
    small = dataclasses.replace(FACTS, cache_tokens=32)
    # The last token needs no place in the cache.
    assert parse_chat({"messages": HI}, small).requests[0].sampling.max_new_tokens == 32 - 7 + 1
    assert parse_chat({"messages": HI, "max_tokens": 9}, FACTS).requests[0].sampling.max_new_tokens == 9


def test_messages_of_every_kind() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    told = [
        {"role": "developer", "content": "D"},
        {"role": "user", "name": "Emma", "content": parts},
        {
            "role": "assistant",
            "content": "A",
            "refusal": None,
            "tool_calls": None,
            "function_call": None,
            "audio": None,
        },
        {"role": "user", "content": ""},
    ]
    assert prompt(told) == "s:D;uEmma:a\nb;a:A;u:;a:"


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        (None, "must be a list such as"), ([], "must be a list such as"), ("Hi", "must be a list such as"), ([7], "must be a list such as"),
        ([{}], "a content must be a text, or a list"), ([{"role": "user", "content": [7]}], "a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "models here read nothing else"),
        ([{"role": "user", "content": [{"type": "text"}]}], "parts must be of the type text"),
        ([{"role": "robot", "content": "x"}], "a role must be one of system, user, assistant"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "tool_call_id is not supported: models here call no tools"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tool_calls is not supported"),
        ([{"role": "user", "content": "x", "other": 1}], 'each must have a \\"role\\"'),
        ([{"role": "user", "content": "\ud800"}], "must be UTF-8 text"), ([{"role": "user", "content": "no"}], "No no."),
        ([{"role": "user", "content": "x" * 60}], "context has 64 tokens, and the request needs 66"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(messages: Any, part: str) -> None:
    error = refused({"messages": messages})
    assert part.replace('\\"', '"') in error.message
    assert error.param in ("messages", "tool_calls", "tool_call_id")


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("tools", [{"type": "function"}], "models here call no tools. Leave it out."), ("functions", [{}], "models here call no tools"),
        ("tool_choice", "required", "models here call no tools"), ("function_call", {"name": "f"}, "models here call no tools"),
        ("response_format", {"type": "json_object"}, "not supported"), ("modalities", ["text", "audio"], "not supported"),
        ("audio", {}, "not supported"), ("store", True, "not supported"), ("store", 0, "not supported"),
        ("reasoning_effort", "low", "not supported"), ("logit_bias", {"5": 1}, "not supported"),
        ("frequency_penalty", 0.5, "not supported"), ("metadata", {"a": "b"}, "not supported"), ("echo", True, "not a field"),
        ("prompt", "x", "not a field"), ("max_token", 5, "Did you mean 'max_tokens'?"), ("user", 5, "must be text"),
        ("safety_identifier", "\ud800", "surrogate"), ("prompt_cache_key", [], "must be text"),
        ("max_tokens", 0, "1 or more"), ("max_completion_tokens", 0, "1 or more"), ("max_completion_tokens", True, "whole number"),
        ("max_completion_tokens", 60, "context has 64 tokens"), ("n", 7, "at most 6"), ("top_logprobs", 2, 'needs "logprobs": true'),
        ("logprobs", 3, "true or false"), ("stop", ["a"] * 5, "at most 4"), ("temperature", -1, "or more"),
        ("stream_options", {"include_usage": True}, '"stream": true'),
    ],
)  # fmt: skip
def test_fields_that_are_refused(field: str, value: Any, part: str) -> None:
    error = refused({"messages": HI, field: value})
    assert error.param == field and part in error.message


def test_two_names_of_one_limit_must_agree() -> None:
    error = refused({"messages": HI, "max_tokens": 5, "max_completion_tokens": 6})
    assert error.message == "max_tokens = 5: is another name of max_completion_tokens, which is 6: give one of them."


def test_every_field_of_openais_schema_works_or_is_refused_by_name() -> None:
    create = pytest.importorskip("openai").types.chat.completion_create_params
    known = {
        *create.CompletionCreateParamsBase.__annotations__,
        *create.CompletionCreateParamsStreaming.__annotations__,
    }
    assert {"messages", "stream", "tools"} <= known and not known - {*FIELDS, *UNSUPPORTED}


def test_any_value_in_any_field_is_an_answer_or_a_sentence() -> None:
    odd = [
        None,
        True,
        -1,
        0,
        1.5,
        1e308,
        10**400,
        "",
        "x",
        [],
        [[1]],
        {},
        {"a": {}},
        [None],
        [{}],
        "\ud800",
        {"type": "text"},
    ]
    for field in (*FIELDS, *UNSUPPORTED, "other"):
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
    assert found == {
        "content": [
            {
                "token": "a", "logprob": -1.0, "bytes": [97],
                "top_logprobs": [{"token": "\ufffd", "logprob": -0.5, "bytes": None}, {"token": "a", "logprob": -1.0, "bytes": [97]}],
            }
        ]
    }  # fmt: skip
