"""The load of the serving benchmark: kinds of requests, the clients that send them, and what they found."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import re
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_samoe import children

WORDS = (
    "Emma was very much surprised to find that the carriage had come a little before its time and that nobody "
    "would have any thing to say about it till the next morning at breakfast"
).split()
#: A prompt, and how many tokens are to follow it.
Wanted = tuple[str, int]
JSON = {"Content-Type": "application/json"}
#: Kinds of requests, and how many of a thousand are of each.
#: Those that the server is to answer.
GOOD_KINDS = {"whole": 330, "streamed": 330, "vanishes": 80, "vanishes in a stream": 80}
KINDS = GOOD_KINDS | {"invalid JSON": 50, "prompt too long": 50, "body too large": 20}
KINDS |= {"unknown field": 30, "unknown model": 15, "unknown path": 15}


@dataclass(frozen=True)
class Plan:
    """What is sent: a kind and a (prompt, max_tokens) per request."""

    requests: tuple[tuple[str, Wanted], ...]
    wanted: list[Wanted]


@dataclass
class Outcome:
    """What came of one request; `fault` says what was wrong."""

    kind: str
    status: int = 0
    fault: str = ""
    busy: int = 0
    time_s: float = 0.0
    first_s: float | None = None


def make_plan(num_requests: int, longest: int, seed: int) -> Plan:
    """Returns a plan; every kind is in it as KINDS says."""
    chance = random.Random(seed)
    wanted = []
    for _ in range(64):
        start, length = chance.randrange(len(WORDS)), chance.randint(1, 20)
        wanted.append((" ".join((WORDS + WORDS)[start : start + length]), chance.randint(1, longest)))
    kinds = [kind for kind, share in KINDS.items() for _ in range(max(1, round(num_requests * share / 1000)))]
    chance.shuffle(kinds)
    return Plan(tuple((kind, chance.choice(wanted)) for kind in kinds), sorted(set(wanted)))


class ServerProcess:
    """The server as a process, on a free port."""

    def __init__(self, flags: list[str], folder: Path):
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            self._process = children.start(
                [sys.executable, "-m", "megatron_samoe", "serve", "--port", "0", *flags], stdout=log, stderr=log
            )
        while (found := re.search(r"serving .* at http://([\d.]+):(\d+)", self.log())) is None:
            if self._process.poll() is not None:
                sys.exit(f"the server did not start:\n{self.log()}")
            time.sleep(0.05)
        self.host, self.port = found[1], int(found[2])
        self._memory = psutil.Process(self._process.pid)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        """Returns what it has printed."""
        return self._log.read_text(errors="replace")

    def memory_bytes(self) -> int:
        """Returns its resident memory."""
        return self._memory.memory_info().rss

    def signal(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Sends SIGTERM if it still runs, and returns its exit status."""
        if self._process.poll() is None:
            self.signal()
        return self._process.wait(120)

    def connect(self) -> http.client.HTTPConnection:
        """Returns a connection of its own."""
        return http.client.HTTPConnection(self.host, self.port, timeout=120)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of `read_metrics`."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return read_metrics(text)


def read_metrics(text: str) -> dict[str, float]:
    """Returns a server's metrics by name and labels, the models' summed: their label is left out."""
    values: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith("#"):
            values[re.sub(r',?model="[^"]*"', "", name).removesuffix("{}").removeprefix("megatron_samoe_")] += float(
                value
            )
    return values


@dataclass
class Client:
    """Sends a plan's requests and judges what comes back."""

    server: ServerProcess
    expected: dict[Wanted, str]
    context: int
    may_end: bool = False
    ending: threading.Event = field(default_factory=threading.Event)

    @property
    def _sees_the_end(self) -> bool:
        """Whether the server has been told to end, so that refusals are right."""
        return self.may_end and self.ending.is_set()

    def send(self, kind: str, wanted: Wanted, chance: random.Random) -> Outcome:
        """Sends one request, again where the server was busy, and returns what came of it."""
        outcome = Outcome(kind)
        while True:
            started = time.monotonic()
            connection = self.server.connect()
            try:
                if not self._once(connection, outcome, wanted, chance):
                    outcome.time_s = time.monotonic() - started
                    return outcome
            except (OSError, http.client.HTTPException) as error:
                if outcome.status or not self._sees_the_end:
                    outcome.fault = f"{kind}: {error!r}"
                return outcome
            finally:
                connection.close()
            outcome.busy += 1
            # What Retry-After says would be polite; these clients are in a hurry.
            time.sleep(0.05 + 0.1 * chance.random())

    def _once(
        self, connection: http.client.HTTPConnection, outcome: Outcome, wanted: Wanted, chance: random.Random
    ) -> bool:
        """Sends the request once; returns whether the server was busy."""
        kind, started = outcome.kind, time.monotonic()
        stream = "stream" in kind
        path, right_status = "/v1/completions", 200
        content: Any = {"prompt": wanted[0], "max_tokens": wanted[1], "temperature": 0, "stream": stream}
        if kind not in GOOD_KINDS:
            path, content, right_status = self._bad_request(kind, wanted[0])
        connection.request("POST", path, content if isinstance(content, str) else json.dumps(content), JSON)
        if kind == "vanishes":
            time.sleep(0.2 * chance.random())
            return False
        answer = connection.getresponse()
        outcome.status = answer.status
        if right_status == 200 and answer.status == 429:
            self._check_error(outcome, answer, 429)
            return not outcome.fault
        if right_status != 200 or answer.status != 200:
            self._check_error(outcome, answer, right_status)
        elif kind == "vanishes in a stream":
            answer.read(chance.randint(1, 400))
        else:
            whole = None if stream else json.loads(answer.read())["choices"][0]["text"]
            text = self._streamed(answer, outcome, started) if stream else whole
            if text is not None and text != self.expected[wanted]:
                outcome.fault = f"{kind}: {wanted} gave {text!r}, alone {self.expected[wanted]!r}"
        return False

    def _streamed(self, answer: Any, outcome: Outcome, started: float) -> str | None:
        text = ""
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if outcome.first_s is None:
                outcome.first_s = time.monotonic() - started
            data = line[6:].decode().strip()
            if data == "[DONE]":
                return text
            event = json.loads(data)
            if "error" in event:
                if self._sees_the_end and event["error"]["code"] == "draining":
                    outcome.status = 503
                else:
                    outcome.fault = f"streamed: {event}"
                return None
            text += event["choices"][0]["text"]
        outcome.fault = "streamed: the stream ended without [DONE]"
        return None

    def _bad_request(self, kind: str, prompt: str) -> tuple[str, Any, int]:
        """Returns path, content and the right status of a request that is to be refused."""
        path = "/v1/completions"
        too_long = " ".join(WORDS * self.context)[: 20 * self.context]
        return {
            "invalid JSON": (path, '{"prompt": ' + prompt, 400),
            "prompt too long": (path, {"prompt": too_long}, 400),
            "body too large": (path, {"prompt": "x" * (1 << 20)}, 413),
            "unknown field": (path, {"prompt": prompt, "max_token": 3}, 400),
            "unknown model": (path, {"prompt": prompt, "model": "another"}, 404),
            "unknown path": ("/v1/chats", {"prompt": prompt}, 404),
        }[kind]

    def _check_error(self, outcome: Outcome, answer: Any, status: int) -> None:
        content = answer.read()
        if self._sees_the_end and answer.status == 503:
            status = 503
        try:
            error = json.loads(content)["error"]
            proper = set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 20
        except (ValueError, KeyError, TypeError):
            proper = False
        if answer.status != status or not proper or (status == 429 and not answer.headers["Retry-After"]):
            outcome.fault = f"{outcome.kind}: status {answer.status} in place of {status}: {content[:200]!r}"


def run_plan(
    server: ServerProcess, plan: Plan, expected: dict[Wanted, str], context: int, concurrency: int
) -> dict[str, Any]:
    """Sends everything, so many requests at a time, and returns the results once all clients have gone; with the server's memory
    at every tenth of the requests."""
    client = Client(server, expected, context)
    memory: list[tuple[float, int]] = []
    started = time.monotonic()
    tenth = max(1, len(plan.requests) // 10)
    finished = itertools.count(1)

    def one(place: int) -> Outcome:
        outcome = client.send(*plan.requests[place], random.Random(place))
        if (number := next(finished)) % tenth == 0:
            memory.append((number / len(plan.requests), server.memory_bytes()))
        return outcome

    with ThreadPoolExecutor(concurrency) as pool:
        outcomes = list(pool.map(one, range(len(plan.requests))))
    time_s = time.monotonic() - started
    deadline = time.monotonic() + 30
    while (still_open := _num_open(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    metrics = server.metrics()
    kinds: list[list[Any]] = []
    for kind in KINDS:
        mine = [o for o in outcomes if o.kind == kind]
        statuses = "/".join(str(s) for s in sorted({o.status for o in mine if o.status})) or "-"
        kinds.append([kind, len(mine), sum(not o.fault for o in mine), statuses, sum(o.busy for o in mine)])
    times = sorted(o.time_s for o in outcomes if o.kind in ("whole", "streamed") and o.status == 200)
    first = [o.first_s for o in outcomes if o.first_s is not None]
    faults = [o.fault for o in outcomes if o.fault]
    # The first tenths fill caches that stay; a leak would go on.
    early, late = (statistics.median(b for s, b in memory if low < s <= high) for low, high in ((0.15, 0.45), (0.7, 1)))
    if late > early * 1.03 + 2**20:
        faults.append(f"the server's memory grew from {early / 2**20:.1f} to {late / 2**20:.1f} MiB")
    seconds = {
        "time_s": time_s,
        "median_s": statistics.median(times),
        "p95_s": times[int(0.95 * (len(times) - 1))],
        "first_median_s": statistics.median(first),
    }
    memory_mib = [(share, size / 2**20) for share, size in memory]
    found = {"kinds": kinds, "faults": faults, "open_at_end": still_open, "memory_mib": memory_mib, **seconds}
    return found | {"tokens": metrics["generated_tokens_total"]}


def _num_open(server: ServerProcess) -> float:
    metrics = server.metrics()
    return metrics["running_choices"] + metrics["waiting_choices"]


def sigterm_under_load(
    server: ServerProcess, plan: Plan, expected: dict[Wanted, str], concurrency: int, after_s: float = 2.0
) -> dict[str, Any]:
    """Sends SIGTERM while clients go on asking; returns what they got from then on.

    A client may get the right answer, 503 with the reason, or, once the process has left, no connection.
    """
    client = Client(server, expected, context=0, may_end=True)
    outcomes: list[Outcome] = []

    def keep_asking(place: int) -> None:
        chance = random.Random(place)
        while True:
            outcome = client.send(chance.choice(("whole", "streamed")), chance.choice(plan.wanted), chance)
            if client.ending.is_set():
                outcomes.append(outcome)
                if outcome.status == 0:  # no connection: it has left
                    return
                time.sleep(0.02)

    with ThreadPoolExecutor(concurrency) as pool:
        asking = [pool.submit(keep_asking, place) for place in range(concurrency)]
        time.sleep(after_s)
        client.ending.set()
        started = time.monotonic()
        server.signal()
        status = server.end()
        time_s = time.monotonic() - started
        for future in asking:
            future.result()
    words = {200: "right answer", 503: "refused with 503", 0: "no connection any more"}
    counts = Counter(words.get(o.status, str(o.status)) for o in outcomes)
    faults = [o.fault for o in outcomes if o.fault]
    return {"counts": dict(counts), "time_s": time_s, "status": status, "faults": faults}
