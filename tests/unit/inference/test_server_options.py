"""A server's options, its socket, its access token, its optional libraries, and which pages of other sites it answers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.server.gate import is_own
from megatron_samoe.inference.server.models import NamedModel
from megatron_samoe.inference.server.run import Server, ServerOptions, check_installed, listen, read_api_key
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import Client, serving

FRIEND, STRANGER = "https://friend.example", "https://evil.example"
ASKED = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}


def test_options_out_of_range_name_their_flag() -> None:
    numbers = {"port": (70000, -1), "max_queue": (-1,), "max_choices": (0,), "max_body_bytes": (0,)}
    times = {"drain_timeout_s": (math.inf,), "body_timeout_s": (math.nan, 0.0)}
    for field, values in (numbers | times).items():
        for value in values:
            with pytest.raises(ConfigError) as caught:
                ServerOptions(**{field: value})
            assert caught.value.field == "--" + field.removesuffix("_s").replace("_", "-")


def test_a_port_in_use_and_a_foreign_address_are_said() -> None:
    listener = listen("127.0.0.1", 0)
    listener.listen()
    with pytest.raises(ConfigError, match="cannot be listened at"):
        listen("127.0.0.1", listener.getsockname()[1])
    listener.close()
    with pytest.raises(ConfigError, match="--host and --port"):
        listen("no.such.host.invalid", 80)


def test_of_two_servers_that_start_together_the_slower_is_told(loaded: LoadedModel) -> None:
    """Both have bound the port while they load a model: Linux refuses only the second who listens."""
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = listen("127.0.0.1", port)
    world = single_process_state().world
    models = [NamedModel("tiny", Engine(loaded, max_batch=1))]
    Server(models, world, ServerOptions(), first)
    with pytest.raises(ConfigError, match=f"'127.0.0.1:{port}': cannot be listened at: Address already in use"):
        Server(models, world, ServerOptions(), second)
    first.close()
    second.close()


def test_where_the_access_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_SAMOE_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("MEGATRON_SAMOE_API_KEY", "from-environment")
    assert read_api_key(None) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert read_api_key(tmp_path / "key") == "from-file"
    for bad in ("", "\n", "two words", "caf\u00e9", "a\nb"):
        (tmp_path / "key").write_text(bad, encoding="utf-8")
        with pytest.raises(ConfigError, match="one word of printable ASCII") as caught:
            read_api_key(tmp_path / "key")
        assert not bad.strip() or bad not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(tmp_path / "missing")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MegatronSamoeError, match=r"uvicorn.*pip install .*\[serve\]'"):
        check_installed()


@pytest.mark.parametrize("origin", [STRANGER, "null", "http://localhost:3000", "http://127.0.0.1"])
def test_pages_of_other_sites_are_refused(client: Client, origin: str) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    for answer in (
        client.ask("POST", "/v1/completions", body, Origin=origin),
        client.ask("GET", "/v1/models", Origin=origin),
        client.ask("OPTIONS", "/v1/completions", Origin=origin, **ASKED),
    ):
        error = answer.json["error"]
        assert answer.status == 403 and error["code"] == "origin_not_allowed" and repr(origin) in error["message"]
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
    own = ["http://x:80 x", "https://x x:443", "http://[::1]:8000 [::1]:8000", "HTTP://X x"]
    for words in (*own, "http://x:8000 x", "http://x.evil x", "null x", "x x", "file:// "):
        assert is_own(*words.split(" ")) == (words in own), words


@pytest.mark.parametrize(
    "origin", ["friend.example", "https://friend.example/", "https://", "https://a b", "HTTPS://x"]
)
def test_what_is_no_origin_is_said_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="each must be an origin") as caught:
        ServerOptions(allowed_origins=(FRIEND, origin))
    assert caught.value.field == "--allowed-origins"
