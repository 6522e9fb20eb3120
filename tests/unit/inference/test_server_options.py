"""A server's options, its socket, where its access token comes from, and its optional libraries."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.server.models import NamedModel
from megatron_samoe.inference.server.run import Server, ServerOptions, check_installed, listen, read_api_key
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import LoadedModel


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
