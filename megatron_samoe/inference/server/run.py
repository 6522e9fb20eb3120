"""A server from its options to its end: the socket, signals, draining, and the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Suppress, arg

from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.inference.server.metrics import ServerMetrics
from megatron_samoe.inference.server.models import NamedModel, ServedModels
from megatron_samoe.installation import install_extra
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.parsing import read_text

#: Where the access token is looked for if no file is given.
KEY_VARIABLE = "MEGATRON_SAMOE_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
#: For what is left after draining: an answer's last bytes, one engine step.
LAST_WORDS_S = 3.0
#: Connections that the system holds until they are taken; uvicorn's default.
BACKLOG = 2048


@dataclass(frozen=True)
class ServerOptions:
    """How the server answers."""

    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 for all of the machine's"""
    port: int = 8000
    """0 takes a free one"""
    api_key: Suppress[str | None] = None
    """token that clients must send; never on the command line, which all users of the machine can read"""
    allowed_hosts: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")] = ()
    """host names to answer under; on a loopback address only its own names, else any, if not given"""
    allowed_origins: Annotated[tuple[str, ...], arg(metavar="ORIGIN [ORIGIN ...]")] = ()
    """origins of pages that may ask from a browser, as https://NAME; * for all; only the server's own page if not given"""
    max_queue: int = 64
    """answers that may wait in addition to those being made; more are refused with 429"""
    max_choices: int = 16
    """prompts times n of one request"""
    max_connections: int = 256
    """HTTP requests answered at a time; more are refused with 503. Four times this number of connections and 64 may be open,
    and no more than half of the files that the process may open"""
    max_body_bytes: int = 1 << 20
    """size of a request; more are refused with 413"""
    body_timeout_s: Annotated[float, arg(name="body-timeout")] = 30.0
    """seconds in which a request's head must have come, and then its body; idle connections are closed after the same time,
    and on Linux those that do not take their answer"""
    drain_timeout_s: Annotated[float, arg(name="drain-timeout")] = 20.0
    """seconds that open requests have after SIGTERM or SIGINT"""

    def __post_init__(self) -> None:
        numbers: dict[int, tuple[str, ...]] = {0: ("port", "max_queue", "body_timeout_s", "drain_timeout_s")}
        numbers[1] = ("max_choices", "max_connections", "max_body_bytes")
        for least, names in numbers.items():
            for name in names:
                if not least <= getattr(self, name) < math.inf:
                    flag = "--" + name.removesuffix("_s").replace("_", "-")
                    raise ConfigError(flag, getattr(self, name), f"must be {least} or more")
        if self.body_timeout_s == 0:
            raise ConfigError("--body-timeout", 0.0, "must be above 0: no request could come in that time")
        for origin in self.allowed_origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError(
                    "--allowed-origins",
                    origin,
                    "each must be an origin as browsers send it, in small letters and without a "
                    "path, such as https://name or http://localhost:3000; * allows all",
                )
        if self.port > 65535:
            raise ConfigError("--port", self.port, "must be at most 65535")

    @property
    def names(self) -> tuple[str, ...]:
        """Host names to answer under; any if empty."""
        if self.allowed_hosts or self.host not in LOOPBACK_NAMES:
            return tuple(name.lower() for name in self.allowed_hosts)
        return LOOPBACK_NAMES


def read_api_key(path: Path | None) -> str | None:
    """Returns the access token from a file, or from the environment, or None: never from the command line, which all
    users of the machine can read.

    Raises:
        ConfigError: the file cannot be read, or the token is not a single word of printable ASCII.
    """
    if path is None:
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    else:
        source = "--api-key-file"
        try:
            key = read_text(path).strip()
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(source, str(path), f"cannot be read: {error}") from error
        if mode & 0o077:
            logger.warning("note: %s can be read by other users of this machine (chmod 600 would end that)", path)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(source, "(not shown)", "must hold one word of printable ASCII characters")
    return key


def check_installed() -> None:
    """Raises ConfigError that says what to install, if the server's optional libraries are missing."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MegatronSamoeError(
            f"The server needs a library that is not installed ({error.name}): {install_extra('serve')}."
        ) from error


@contextlib.contextmanager
def _refusing(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot be listened at: {error.strerror or error}"
        raise ConfigError("--host and --port", f"{host}:{port}", reason) from error


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: the address is not of this machine, or the port is taken or not allowed.
    """
    with _refusing(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


def check_processes(group: Group, names: Sequence[str], show_experts: bool) -> None:
    """Raises ConfigError for what a server of several processes cannot do."""
    for flag, given in (("--show-experts", show_experts), ("--beside", " ".join(names[1:]))):
        if given and group.size > 1:
            raise ConfigError(flag, given, f"needs a server of one process; this has {group.size}")


class Server:
    """Serves models until it is asked to end.

    Args:
        models: the first answers requests that name none.
        group: all ranks of the one engine's layout, where the others run `follow`; several models need one process.
        listener: bound; see `listen`.

    Raises:
        ConfigError: another server has begun to listen at the address, or experts or several models are to be shown of
            several ranks, or two models have one name.
    """

    def __init__(self, models: Sequence[NamedModel], group: Group, options: ServerOptions, listener: socket.socket):
        check_installed()  # what is imported here needs the extra
        import uvicorn

        from megatron_samoe.inference.server.app import build_app
        from megatron_samoe.inference.server.connection import waiting_protocol
        from megatron_samoe.inference.server.gate import GateLimits

        check_processes(group, [model.name for model in models], any(model.shown for model in models))

        metrics = ServerMetrics()
        self._models = ServedModels(models, group, metrics, options.max_queue, options.max_choices)
        with _refusing(*listener.getsockname()[:2]):  # two servers that start at once may both have bound the address
            listener.listen(BACKLOG)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: for clients that do not read; connections have it from here
            most_ms = min(math.ceil(1000 * options.body_timeout_s), 2**31 - 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, most_ms)
        self._options, self._listener = options, listener
        gate = GateLimits(options.api_key, options.names, options.allowed_origins, options.max_connections)
        app = build_app(self._models, metrics, gate, options.max_body_bytes, options.body_timeout_s)
        # Connections that wait cost little, so there may be many; the gate counts requests that are complete.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31  # -1: no limit
        most = min(4 * options.max_connections + 64, files // 2)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            loop="asyncio",
            http=waiting_protocol(most),
            ws="none",
            backlog=max(1, files // 16),  # taken at once: too many are closed some rounds of the loop later
            timeout_keep_alive=options.body_timeout_s,  # type: ignore[arg-type]  # any number of seconds will do
            timeout_graceful_shutdown=max(1, round(LAST_WORDS_S)),
        )
        self._uvicorn = _signalled(uvicorn.Server)(config, self._on_signal)
        self._asked = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Serves until SIGTERM, SIGINT, `end` or a failure of the engine; returns the exit status, 0 except for the last.

        Args:
            ready: called once requests and signals are taken.
        """
        return asyncio.run(self._run(ready))

    def end(self) -> None:
        """Asks for the end, as SIGTERM does; any thread may."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._asked.set)

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            logger.warning("%s again: ending at once", signal.Signals(number).name)
            self._uvicorn.force_exit = self._uvicorn.should_exit = True
        self.end()

    async def _run(self, ready: Callable[[], None]) -> int:
        self._loop = asyncio.get_running_loop()
        self._models.start()
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(0.005)
        if self._uvicorn.started:
            self._listener.listen(BACKLOG)  # asyncio lets the system hold only the number that it takes at once
        ready()
        asked, failed = asyncio.create_task(self._asked.wait()), asyncio.create_task(self._models.failed.wait())
        await asyncio.wait((serving, asked, failed), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done() and not failed.done():
            await self._drain(serving, failed)
        if failed.done():
            self._models.fail()
        self._uvicorn.should_exit = True
        await serving
        for task in (asked, failed):
            task.cancel()
        if not await self._models.stop(10 * LAST_WORDS_S):
            logger.warning("an engine's step has not ended; leaving without it")
        return 1 if self._models.failed.is_set() else 0

    async def _drain(self, serving: asyncio.Task, failed: asyncio.Task) -> None:
        """Waits for the open requests; new ones are refused meanwhile, so the socket stays open."""
        num_open, limit_s = self._models.num_open, self._options.drain_timeout_s
        logger.info("shutting down: %d choices are open and have %g s", num_open, limit_s)
        drained = asyncio.create_task(self._models.drain(limit_s))
        await asyncio.wait((serving, failed, drained), return_when=asyncio.FIRST_COMPLETED)
        if drained.done() and not drained.result():
            logger.warning("%d choices were not complete after %g s and are cut off", self._models.num_open, limit_s)
        drained.cancel()


def _signalled(base: Any) -> Any:
    """Returns uvicorn's server class with signals that only notify us: its own would close the socket at once, and end
    the process by the signal at last."""

    class SignalledServer(base):
        def __init__(self, config: Any, tell: Callable[[int], None]):
            super().__init__(config)
            self._tell = tell

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            try:
                before = {s: signal.signal(s, lambda n, _: self._tell(n)) for s in (signal.SIGTERM, signal.SIGINT)}
            except ValueError:  # only the main thread may do it
                before = {}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return SignalledServer
