"""Pages of other sites: which may ask a server from a browser, and which are refused."""

from __future__ import annotations

import pytest

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.server.gate import is_own
from megatron_samoe.inference.server.run import ServerOptions
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import Client, serving

FRIEND, STRANGER = "https://friend.example", "https://evil.example"
ASKED = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}


@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost:3000", "http://127.0.0.1"])
def test_pages_of_other_sites_are_refused(client: Client, origin: str) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    for answer in (
        client.ask("POST", "/v1/completions", body, Origin=origin),
        client.ask("GET", "/v1/models", Origin=origin),
        client.ask("OPTIONS", "/v1/completions", Origin=origin, **ASKED),
    ):
        assert answer.status == 403 and answer.json["error"]["code"] == "origin_not_allowed"
        assert (
            repr(origin) in answer.json["error"]["message"] and "--allowed-origins" in answer.json["error"]["message"]
        )
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_servers_own_page_and_programs_are_answered(client: Client) -> None:
    own = f"http://{client.host}:{client.port}"
    for headers in ({"Origin": own}, {"Origin": own.upper()}, {}):
        assert client.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, **headers).status == 200


def test_allowed_origins_may_ask_and_read_refusals(loaded: LoadedModel) -> None:
    with serving(loaded, allowed_origins=(FRIEND,), api_key="secret") as running:
        client = running.client
        preflight = client.ask("OPTIONS", "/v1/completions", Origin=FRIEND, **ASKED)
        assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == FRIEND
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert client.ask("OPTIONS", "/v1/completions", Origin=STRANGER, **ASKED).status == 400
        body = {"prompt": "x", "max_tokens": 2, "stream": True}
        for token, status in (("wrong", 401), ("secret", 200)):
            answer = client.ask("POST", "/v1/completions", body, Origin=FRIEND, Authorization=f"Bearer {token}")
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, FRIEND)
        assert answer.events[-1] == "[DONE]"
        answer = client.ask("POST", "/v1/completions", body, Origin=STRANGER, Authorization="Bearer secret")
        assert answer.status == 403 and "access-control-allow-origin" not in answer.headers


def test_all_origins(loaded: LoadedModel) -> None:
    with serving(loaded, allowed_origins=("*",)) as running:
        answer = running.client.ask("GET", "/v1/models", Origin=STRANGER)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_what_is_the_servers_own() -> None:
    for origin, host in (
        ("http://x:80", "x"),
        ("https://x", "x:443"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("HTTP://X", "x"),
    ):
        assert is_own(origin, host), origin
    for origin, host in (("http://x:8000", "x"), ("http://x.evil", "x"), ("null", "x"), ("x", "x"), ("file://", "")):
        assert not is_own(origin, host), origin


@pytest.mark.parametrize(
    "origin", ["friend.example", "https://friend.example/", "https://", "https://a b", "HTTPS://x"]
)
def test_what_is_no_origin_is_said_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="each must be an origin") as caught:
        ServerOptions(allowed_origins=(FRIEND, origin))
    assert caught.value.field == "--allowed-origins"
