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
from tests.harness.tables import table

TABLE = table(__file__, tuples=False)
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
    idle = {name: values[-1] for name, values in UNSUPPORTED.items()}
    call = parse_chat({"messages": HI, **TABLE["all fields"], **idle}, FACTS)
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
        {"role": "assistant", "content": "A", **dict.fromkeys(("refusal", "tool_calls", "function_call", "audio"))},
        {"role": "user", "content": ""},
    ]
    assert prompt(told) == "s:D;uEmma:a\nb;a:A;u:;a:"


@pytest.mark.parametrize(("messages", "part"), TABLE["messages"])
def test_messages_that_are_refused(messages: Any, part: str) -> None:
    error = refused({"messages": messages})
    assert part in error.message and error.param in ("messages", "tool_calls", "tool_call_id")


@pytest.mark.parametrize("field", TABLE["refused"])
def test_fields_that_are_refused(field: str) -> None:
    for value, part in TABLE["refused"][field]:
        error = refused({"messages": HI, field: value})
        assert error.param == field and part in error.message, value


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
    numbers, texts = [True, -1, 0, 1.5, 1e308, 10**400], ["", "x", "\ud800"]
    odd = [None, *numbers, *texts, [], [[1]], [None], [{}], {}, {"a": {}}, {"type": "text"}]
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
    tokens = [("\ufffd", -0.5, None), ("a", -1.0, [97])]
    likely, made = ({"token": text, "logprob": logprob, "bytes": data} for text, logprob, data in tokens)
    assert found == {"content": [{**made, "top_logprobs": [likely, made]}]}
