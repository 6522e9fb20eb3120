"""What a completion request means, and every way in which one is refused, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.inference.server.gate import host_name
from megatron_samoe.inference.server.models import asked_model
from megatron_samoe.inference.server.protocol import ApiError, ModelFacts, parse_body, parse_completion
from tests.harness.tables import table

TABLE = table(__file__, tuples=False)
FACTS = ModelFacts("tiny", ByteTokenizer(), vocab_size=257, context_length=64, cache_tokens=256, max_choices=6)


def refused(body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_completion(body, FACTS)
    return caught.value


def test_a_request_of_all_fields() -> None:
    call = parse_completion(TABLE["all fields"], FACTS)
    assert [r.prompt_ids for r in call.requests] == [[72, 105]] * 2
    first, second = (r.sampling for r in call.requests)
    assert (first.max_new_tokens, first.temperature, first.top_p, first.top_k) == (5, 0.5, 0.9, 7)
    assert (first.repetition_penalty, first.stop, first.ignore_eod) == (1.2, ("\n", "."), True)
    assert (first.seed, second.seed) == (11, 12)
    assert call.heads == ("Hi", "Hi") and call.stream and call.include_usage and call.prompt_tokens == 2


def test_defaults_are_those_of_the_api() -> None:
    (request,) = parse_completion({"prompt": "Hi", "stop": None, "seed": None, "n": None}, FACTS).requests
    options = request.sampling
    assert (options.max_new_tokens, options.temperature, options.top_p, options.top_k) == (16, 1.0, 1.0, 0)
    assert options.stop == () and not options.ignore_eod
    (other,) = parse_completion({"prompt": "Hi"}, FACTS).requests
    assert other.sampling.seed != options.seed, "requests without a seed must not all be alike"


@pytest.mark.parametrize(
    ("prompt", "ids", "num_tokens"),
    [
        ([7, 8], [[7, 8]], 2),
        (["a", "bc"], [[97], [98, 99]], 3),
        ([[1, 2], [3]], [[1, 2], [3]], 3),
        (["a", [5]], [[97], [5]], 2),
    ],
)
def test_prompts_of_every_kind(prompt: Any, ids: list[list[int]], num_tokens: int) -> None:
    call = parse_completion({"prompt": prompt, "echo": True, "n": 2}, FACTS)
    assert [r.prompt_ids for r in call.requests] == [p for p in ids for _ in range(2)]
    assert call.prompt_tokens == num_tokens
    assert call.heads == tuple(FACTS.tokenizer.decode(p) for p in ids for _ in range(2))


def test_max_tokens_fills_the_context_and_no_more() -> None:
    assert parse_completion({"prompt": "x" * 60, "max_tokens": 4}, FACTS).requests[0].sampling.max_new_tokens == 4
    assert parse_completion({"prompt": "x" * 60}, FACTS).requests[0].sampling.max_new_tokens == 4
    for body, param in (
        ({"prompt": "x" * 60, "max_tokens": 5}, "max_tokens"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"prompt": [1] * 1000}, "prompt"),
        ({"prompt": "x" * 65, "max_tokens": 0, "echo": True}, "prompt"),
    ):
        error = refused(body)
        assert (error.status, error.code, error.param) == (400, "context_length_exceeded", param)
        assert "64 tokens" in error.message


@pytest.mark.parametrize("field", TABLE["refused"])
def test_a_value_that_is_not_allowed_is_named(field: str) -> None:
    for value, part in (*TABLE["refused"][field], (10**400, "too large")):
        error = refused({"prompt": "Hi", field: value})
        assert error.status == 400 and error.param == field and part in error.message and field in error.message, value
        assert error.body["error"]["type"] == "invalid_request_error"
        assert len(error.message) < 400


@pytest.mark.parametrize("field", TABLE["unsupported"])
def test_a_field_without_code_behind_it_is_refused(field: str) -> None:
    for value in TABLE["unsupported"][field]:
        error = refused({"prompt": "Hi", field: value})
        assert (error.status, error.param, error.code) == (400, field, "unsupported_field"), value


def test_a_mistyped_field_is_refused_with_the_nearest_name() -> None:
    error = refused({"prompt": "Hi", "max_token": 5})
    assert error.code == "unknown_field" and "Did you mean 'max_tokens'?" in error.message
    assert len(refused({"prompt": "Hi", "x" * 10**6: 5}).message) < 400


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError, match="this server has 'tiny', 'small'") as caught:
        asked_model({"prompt": "Hi", "model": "gpt-4"}, ["tiny", "small"])
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert asked_model({"model": "small"}, ["tiny", "small"]) == "small"
    assert asked_model({}, ["tiny", "small"]) == asked_model({"model": None}, ["tiny", "small"]) == "tiny"


@pytest.mark.parametrize(
    "raw",
    [*map(str.encode, TABLE["no object"]), b'{"prompt": "\xff"}', b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000],
)
def test_a_body_that_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(raw)
    assert caught.value.status == 400 and "JSON" in caught.value.message
    json.dumps(caught.value.body)


def test_host_names() -> None:
    cases = {"localhost:8000": "localhost", "127.0.0.1": "127.0.0.1", "[::1]:80": "::1", "Evil.example": "evil.example"}
    assert {header: host_name(header) for header in cases} == cases
