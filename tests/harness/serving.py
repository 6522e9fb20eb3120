"""A tiny model, a server over it in a thread of this process, and an HTTP client: real sockets, a real web server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_samoe.convert.opener import open_folder
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.inference.server.models import NamedModel
from megatron_samoe.inference.server.run import Server, ServerOptions, listen
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import LoadedModel, load_model
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.setup import build_setup, initial_state
from tests.harness.tiny import tiny_config
from tools.benchmarks.serve_load import read_metrics

#: Far apart logits: the order of additions, which the batch's size decides, does not change the largest.
SHARP = {"init_method_std": 0.5}
CONTEXT = 64


def save_tiny(folder: Path, experts: str = "samoe", **options: Any) -> Path:
    """Saves a model of random weights over bytes and returns its folder of checkpoints."""
    data = {"mock_data": True, "tokenizer_type": "ByteTokenizer", "save": str(folder)}
    sizes = {"style": "llama", "num_layers": 2, "seq_length": CONTEXT, **SHARP}
    config = tiny_config(experts, **{**sizes, **data, **options})
    setup = build_setup(config, 257, single_process_state())
    save_run(setup, initial_state(setup))
    return folder


def load_tiny(folder: Path) -> LoadedModel:
    """Returns the model of `save_tiny`, in this process."""
    return load_model(open_folder(folder), single_process_state())


class SlowEngine(Engine):
    """An engine whose steps take a while, so that a test can act meanwhile."""

    step_s = 0.02

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_s)
        return super().step()


def greedy_text(loaded: LoadedModel, prompt: str, max_tokens: int, stop: tuple[str, ...] = ()) -> str:
    """Returns what an engine that has nothing else to do makes of a prompt."""
    engine = Engine(loaded, max_batch=1)
    options = SamplingOptions(max_tokens, temperature=0.0, stop=stop)
    engine.submit(Request(loaded.tokenizer.encode(prompt), options))
    text = ""
    while engine.has_work:
        text += "".join(event.text for event in engine.step())
    return text


@dataclass
class Answer:
    """What a server has said."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events: JSON, or the text [DONE]."""
        lines = [line.removeprefix("data: ") for line in self.content.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass
class Client:
    """Sends requests to a server."""

    host: str
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Sends one request, on a connection of its own, and returns the answer; bytes are sent as they are."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        own = {name.replace("_", "-"): value for name, value in headers.items()}
        kind = {} if content is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, content, {**kind, **self.headers, **own})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def complete(self, prompt: Any, **options: Any) -> Answer:
        """Asks for a completion."""
        return self.ask("POST", "/v1/completions", {"prompt": prompt, **options})

    def begin(self, body: dict[str, Any]) -> socket.socket:
        """Sends a completion request and returns the connection without reading."""
        content = json.dumps(body).encode()
        connection = socket.create_connection((self.host, self.port), timeout=60)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def metric(self, name: str) -> float:
        """Returns the value of one line of the metrics, of all models; 0 where there is none."""
        return read_metrics(self.ask("GET", "/metrics").content.decode())[name]


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits until a condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


class RunningServer:
    """A server in a thread."""

    def __init__(self, models: Sequence[NamedModel], options: ServerOptions):
        listener = listen(options.host, options.port)
        self.server = Server(models, single_process_state().world, options, listener)
        host, _, port = self.server.url.removeprefix("http://").rpartition(":")
        self.client = Client(host, int(port))
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_for(self._answers)

    def _run(self) -> None:
        self.status = self.server.run()

    def _answers(self) -> bool:
        try:
            return self.client.ask("GET", "/health").status > 0
        except OSError:
            return False

    def join(self, timeout_s: float = 30.0) -> int | None:
        """Waits for the end and returns the exit status, None if it goes on."""
        self._thread.join(timeout_s)
        return self.status


@contextmanager
def serving(
    loaded: LoadedModel,
    *,
    max_batch: int = 4,
    engine: Engine | None = None,
    show_experts: bool = False,
    beside: Mapping[str, LoadedModel | Engine] | None = None,
    **options: Any,
) -> Iterator[RunningServer]:
    """Runs a server for a while, of a model that it calls tiny, and of others; options are of `ServerOptions`."""
    models = [NamedModel("tiny", engine or Engine(loaded, max_batch=max_batch), loaded.model if show_experts else None)]
    for name, other in (beside or {}).items():
        if isinstance(other, Engine):
            models.append(NamedModel(name, other))
        else:
            models.append(NamedModel(name, Engine(other, max_batch=max_batch), other.model if show_experts else None))
    running = RunningServer(models, ServerOptions(**{"port": 0, **options}))
    try:
        yield running
    finally:
        running.server.end()
        assert running.join() is not None, "the server does not end"


def texts(answer: Answer) -> Sequence[str]:
    """Returns the choices' texts of a whole or a streamed answer."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return [choice["text"] for choice in answer.json["choices"]]
    pieces: dict[int, str] = {}
    for event in answer.events[:-1]:
        for choice in event["choices"]:
            pieces[choice["index"]] = pieces.get(choice["index"], "") + choice["text"]
    return [pieces[i] for i in sorted(pieces)]


def check_error(answer: Answer, status: int, part: str, **fields: Any) -> dict[str, Any]:
    """Asserts that an answer is an error in OpenAI's form with these words and fields, and returns it."""
    assert answer.status == status, answer.content
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and part in error["message"]
    assert fields.items() <= error.items()
    return error
