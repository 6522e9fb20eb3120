"""The server over real sockets: answers, refusals, limits, and clients that go."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.server.answers import joined_logprobs
from megatron_samoe.inference.server.protocol import FIELDS, UNSUPPORTED
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import (
    CONTEXT,
    Answer,
    Client,
    SlowEngine,
    check_error,
    greedy_text,
    serving,
    texts,
    wait_for,
)


def test_the_shape_of_an_answer(client: Client) -> None:
    answer = client.complete("Hello", model="tiny", max_tokens=3, n=2, seed=1, ignore_eos=True)
    body = answer.json
    assert body["object"] == "text_completion" and body["model"] == "tiny" and body["id"].startswith("cmpl-")
    assert abs(body["created"] - time.time()) < 100
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert [(c["index"], c["finish_reason"], c["logprobs"]) for c in body["choices"]] == [
        (0, "length", None),
        (1, "length", None),
    ]


def test_the_shape_of_a_stream(client: Client) -> None:
    ask = {"max_tokens": 6, "n": 2, "seed": 1, "echo": True, "stream": True, "ignore_eos": True}
    answer = client.complete("Hello", stream_options={"include_usage": True}, **ask)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *pieces, usage, done = answer.events
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert {p["id"] for p in (*pieces, usage)} == {usage["id"]} and all("usage" not in p for p in pieces)
    reasons = [(c["index"], c["finish_reason"]) for p in pieces for c in p["choices"] if c["finish_reason"]]
    assert sorted(reasons) == [(0, "length"), (1, "length")]
    whole = client.complete("Hello", **{**ask, "stream": False})
    assert texts(answer) == texts(whole) and texts(answer)[0].startswith("Hello")
    assert "usage" not in client.complete("Hello", **ask).events[-2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("new", [0, 4])
@pytest.mark.parametrize("prompt", ["Emma was very much", "x" * CONTEXT], ids=["short", "whole context"])
def test_log_probabilities_are_the_models(
    client: Client, loaded: LoadedModel, prompt: str, new: int, stream: bool
) -> None:
    """Of a prompt alone, too ("max_tokens" 0), as other servers of this API score one."""
    new = min(new, CONTEXT - len(prompt))
    asked = {"max_tokens": new, "temperature": 0, "echo": True, "logprobs": 3, "ignore_eos": True}
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.complete(prompt, stop=[" was"] if new == 0 else None, **asked, **streamed)
    pieces = (
        [choice for event in answer.events[:-1] for choice in event["choices"]] if stream else answer.json["choices"]
    )
    assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == ["length"]
    told = joined_logprobs([piece["logprobs"] for piece in pieces])
    model, ids = LanguageModel(loaded), loaded.tokenizer.encode(prompt)
    usage = answer.events[-2]["usage"] if stream else answer.json["usage"]
    assert usage == {"prompt_tokens": len(ids), "completion_tokens": new, "total_tokens": len(ids) + new}
    ids += model.generate_ids(ids, new, temperature=0.0) if new else []
    assert texts(answer) == [loaded.tokenizer.decode(ids)]
    expected = model.logits(ids[:-1]).double().log_softmax(-1)
    assert told is not None and {len(told[key]) for key in told} == {len(ids)}
    assert "".join(told["tokens"][: len(prompt)]) == prompt
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(
        expected[range(len(ids) - 1), ids[1:]].tolist(), rel=1e-4, abs=1e-5
    )
    assert told["text_offset"][: len(prompt)] == list(range(len(prompt)))
    for row, top in zip(expected, told["top_logprobs"][1:], strict=True):
        assert max(top.values()) == pytest.approx(float(row.max()), rel=1e-4, abs=1e-5) and 1 <= len(top) <= 4


def test_only_the_new_tokens_are_told_without_an_echo(client: Client) -> None:
    (choice,) = client.complete("Hi", max_tokens=3, temperature=0, logprobs=0, ignore_eos=True).json["choices"]
    told = choice["logprobs"]
    assert len(told["tokens"]) == 3 and told["text_offset"][0] == 0
    assert [list(top.values()) for top in told["top_logprobs"]] == [[p] for p in told["token_logprobs"]]
    (choice,) = client.complete("Hello", max_tokens=0, echo=True).json["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("Hello", "length", None)


def test_seeds_repeat_and_choices_differ(client: Client) -> None:
    first, again = (texts(client.complete("Hi", seed=5, n=3, max_tokens=12)) for _ in range(2))
    other = texts(client.complete("Hi", seed=50, n=3, max_tokens=12))
    assert first == again and len({*first, *other}) == 6
    # Choice i of prompt j has the seed + j n + i.
    prompts, ask = ["Hi", "Emma", "Hi"], {"max_tokens": 12, "temperature": 9, "ignore_eos": True}
    alone = [texts(client.complete(prompts[j], seed=5 + 2 * j + i, **ask))[0] for j in range(3) for i in range(2)]
    assert texts(client.complete(prompts, seed=5, n=2, **ask)) == alone and len(set(alone)) == 6


def test_models_health_and_metrics(client: Client) -> None:
    (model,) = client.ask("GET", "/v1/models").json["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and model["max_model_len"] == CONTEXT
    assert client.ask("GET", "/v1/models/tiny").json == model
    assert client.ask("GET", "/v1/models/").json == {"object": "list", "data": [model]}
    health = client.ask("GET", "/health")
    assert (health.status, health.json) == (200, {"status": "ready"})
    before = client.metric("generated_tokens_total")
    client.complete("Hello", max_tokens=7, ignore_eos=True)
    assert client.metric("generated_tokens_total") == before + 7
    assert client.metric('http_requests_total{route="/health",status="200"}') >= 1
    assert client.metric("engine_step_seconds_count") > 0
    assert client.metric("running_choices") == client.metric("waiting_choices") == 0
    metrics = client.ask("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name for family in text_string_to_metric_families(metrics.content.decode())}
    assert {"megatron_samoe_choices", "megatron_samoe_time_to_first_token_seconds"} <= families


def test_refusals_have_a_status_and_a_message(client: Client) -> None:
    ask = client.ask
    check_error(ask("POST", "/v1/completions", b"{nonsense"), 400, "not JSON", code="invalid_json")
    check_error(client.complete("x" * 64), 400, "context has 64 tokens", code="context_length_exceeded")
    check_error(client.complete("x", n=7), 400, "at most 6", param="n")
    check_error(client.complete("x", model="gpt-4"), 404, "not served", code="model_not_found")
    check_error(ask("GET", "/v1/chats"), 404, "There is no", code="not_found")
    check_error(ask("GET", "/v1/completions"), 405, "does not take GET")
    assert ask("GET", "/v1/completions").headers["allow"] == "POST"
    check_error(ask("GET", "/v1/models/gpt-4"), 404, "not served", code="model_not_found")
    form = {"Content_Type": "text/plain"}
    check_error(ask("POST", "/v1/completions", b'{"prompt": "x"}', **form), 415, "application/json")
    assert client.complete("x", max_tokens=1).status == 200


def test_a_body_over_the_limit_is_413_and_the_client_hears_it(client: Client) -> None:
    for size in (2001, 30_000, 200_000):
        error = client.ask("POST", "/v1/completions", b'{"prompt": "' + b"x" * size + b'"}')
        check_error(error, 413, "may have 2000 bytes", code="body_too_large")
    # Chunks without a length count as well.
    content = (b"x" * 100 for _ in range(50))
    connection = http.client.HTTPConnection(client.host, client.port, timeout=20)
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_head_without_a_host(client: Client) -> None:
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200 OK")


#: JSON, or nearly so, that is right in no field: Python or a conversion refuses it, or it is too large for one.
DIGITS = "9" * 4300
HOSTILE = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e" + "9" * 1000, "1" * 400, str(2**64)),
    *(DIGITS, "-" + DIGITS, DIGITS + "9", "9" * 10**6, f"[{DIGITS}]", f"[[{DIGITS}]]"),
    *('"\\ud800"', '["\\udfff"]', '{"\\ud800": 1}', '{"a": 1, "a": 1}'),
    *("[" * 500 + "]" * 500, "[" * 10**5, '{"a":' * 500 + "1" + "}" * 500),
]


def test_values_that_are_right_in_no_field(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"/v1/completions": (*FIELDS, *UNSUPPORTED, "other"), "/v1/experts": ("model", "prompt", "other")}
    with serving(loaded, show_experts=True) as running:

        def refusal(path: str, field: str, value: str) -> dict[str, Any]:
            given = '"prompt": "x", ' * (field != "prompt")
            answer = running.client.ask("POST", path, f'{{{given}"{field}": {value}}}'.encode())
            assert len(answer.content) < 1000, (field, value[:20])
            status = 404 if field == "model" and answer.status == 404 else 400
            return check_error(answer, status, "", type="invalid_request_error")

        for path, names in fields.items():
            for field in names:
                for value in HOSTILE:
                    refusal(path, field, value)
        # Where the parser just does not give up, the words of the refusal are made at about the same depth.
        fits, not_any_more = 500, 10**5
        while not_any_more - fits > 1:
            depth = (fits + not_any_more) // 2
            if refusal("/v1/completions", "n", "[" * depth + "]" * depth)["code"] == "invalid_json":
                not_any_more = depth
            else:
                fits = depth
        for depth in range(fits - 30, fits):
            refusal("/v1/completions", "n", "[" * depth + "]" * depth)
    assert not [record for record in caplog.records if record.exc_info]


def test_names_of_other_sites_are_refused(client: Client) -> None:
    check_error(client.ask("GET", "/v1/models", Host="evil.example"), 403, "'evil.example'", code="host_not_allowed")
    for own in (f"localhost:{client.port}", "LocalHost", "127.0.0.1", "[::1]:80"):
        assert client.ask("GET", "/v1/models", Host=own).status == 200, own


def test_a_full_queue_is_429_with_the_time_to_wait(loaded: LoadedModel) -> None:
    engine = SlowEngine(loaded, max_batch=2)
    engine.step_s = 0.05
    with serving(loaded, engine=engine, max_queue=2) as running:
        client = running.client
        body = {"prompt": "x", "max_tokens": 40, "ignore_eos": True}
        held = [client.begin({**body, "n": 2}) for _ in range(2)]
        wait_for(lambda: client.metric("running_choices") + client.metric("waiting_choices") == 4)
        answer = client.complete("x")
        check_error(answer, 429, "holds 4 choices", type="rate_limit_error", code="queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        for connection in held:
            connection.close()
        wait_for(lambda: client.metric('choices_total{end="cancelled"}') == 4)
        assert client.complete("x", max_tokens=2).status == 200, "room that a vanished client held is free"


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_vanish_are_cancelled_and_their_places_freed(loaded: LoadedModel, stream: bool) -> None:
    engine = SlowEngine(loaded, max_batch=2)
    engine.step_s = 0.05  # 60 tokens take longer than a connection without a sending side is kept
    with serving(loaded, engine=engine) as running:
        client = running.client
        free = client.metric("free_cache_tokens")
        body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": stream}
        held = [client.begin(body) for _ in range(3)]  # one of them waits for a place
        wait_for(lambda: client.metric("running_choices") == 2 and client.metric("waiting_choices") == 1)
        for connection in held:
            connection.close()
        wait_for(lambda: client.metric('choices_total{end="cancelled"}') == 3)
        assert client.metric("free_cache_tokens") == free and not engine.has_work
        assert client.metric("generated_tokens_total") < 120
        assert texts(client.complete("Hello", max_tokens=9, temperature=0)) == [greedy_text(loaded, "Hello", 9)]
        answered = 'http_requests_total{{route="/v1/completions",status="{}"}}'.format
        assert (client.metric(answered("200")), client.metric(answered("499"))) == (1, 3), "nobody waited for three"


def test_too_many_requests_at_a_time_are_503(loaded: LoadedModel) -> None:
    with serving(loaded, engine=SlowEngine(loaded, max_batch=8), max_connections=3) as running:
        held = [running.client.begin({"prompt": "x", "max_tokens": 60, "ignore_eos": True}) for _ in range(3)]
        refused: list[Answer] = []

        def full() -> bool:
            answer = running.client.ask("GET", "/health")
            if answer.status == 503:
                refused.append(answer)
            return answer.status == 503

        wait_for(full)
        check_error(refused[0], 503, "3 HTTP requests at a time", code="too_many_connections")
        assert refused[0].headers["retry-after"] == "1"
        for connection in held:
            connection.close()
        wait_for(lambda: running.client.ask("GET", "/health").status == 200)


def test_the_access_token(loaded: LoadedModel) -> None:
    with serving(loaded, api_key="secret-1") as running:
        client = running.client
        for wrong in (None, "Bearer secret-2", "Basic secret-1", "Bearer", "Bearer s\u00e9cret"):
            for path, body in (("/v1/models", None), ("/v1/completions", {}), ("/metrics", None), ("/no", None)):
                headers = {} if wrong is None else {"Authorization": wrong}
                method = "GET" if body is None else "POST"
                answer = Client(client.host, client.port, headers).ask(method, path, body)
                check_error(answer, 401, "access token", type="authentication_error", code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.ask("GET", "/health").status == client.ask("GET", "/").status == 200
        right = Client(client.host, client.port, {"Authorization": "Bearer secret-1"})
        assert right.complete("x", max_tokens=1).status == 200 and right.metric("generated_tokens_total") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_can_never_fit_the_cache(loaded: LoadedModel, stream: bool) -> None:
    with serving(loaded, engine=Engine(loaded, max_batch=2, max_tokens=16)) as running:
        for size, status in ((16, 200), (17, 400)):
            answer = running.client.complete("x", max_tokens=size, stream=stream)
            assert answer.status == status
        check_error(answer, 400, "key-value cache has 16 tokens", param="max_tokens")


def test_many_clients_at_once_get_right_answers(loaded: LoadedModel) -> None:
    """A small sample of what megatron-samoe benchmark serve does by the thousand."""
    prompts = [f"Prompt {i} " + "ab" * (i % 11) for i in range(24)]
    expected = {p: greedy_text(loaded, p, 5 + len(p) % 17) for p in prompts}
    with serving(loaded, max_batch=4) as running, ThreadPoolExecutor(12) as pool:
        threads = threading.active_count()

        def ask(place: int) -> bool:
            prompt = prompts[place % 24]
            if place % 6 == 5:
                running.client.begin({"prompt": prompt, "max_tokens": 20}).close()
                return True
            answer = running.client.complete(
                prompt, max_tokens=5 + len(prompt) % 17, temperature=0, stream=place % 2 == 0
            )
            return texts(answer) == [expected[prompt]]

        assert all(pool.map(ask, range(96)))
        wait_for(lambda: running.client.metric("running_choices") + running.client.metric("waiting_choices") == 0)
        assert threading.active_count() < threads + 40


def test_a_fault_of_the_servers_own_is_500_and_the_next_request_is_answered(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenTokenizer(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            if text == "fault":
                raise RuntimeError("secret of the server")
            return super().encode(text)

    engine = Engine(loaded, max_batch=2)
    monkeypatch.setattr(engine, "tokenizer", BrokenTokenizer())
    with serving(loaded, engine=engine) as running:
        answer = running.client.complete("fault")
        check_error(answer, 500, "its log has the reason", type="server_error")
        assert b"secret" not in answer.content
        assert running.client.complete("x", max_tokens=1).status == 200
