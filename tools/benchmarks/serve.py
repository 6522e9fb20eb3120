"""A server under the load of careless clients, every answer of which is checked."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_samoe.convert.opener import open_folder
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import load_model
from tools.benchmarks.harness import Benchmark, Row
from tools.benchmarks.serve_load import ServerProcess, Wanted, make_plan, run_plan, sigterm_under_load


@dataclass(frozen=True, kw_only=True)
class Serve(Benchmark):
    """a server under the load of careless clients

    Starts the server, sends requests so many at a time over 127.0.0.1, and ends it by SIGTERM under load. Requests are of
    all kinds: greedy completions of mixed lengths, streamed and whole; clients that vanish; JSON that is none; prompts
    beyond the context; bodies beyond the limit; unknown fields, models and paths. Checked: each completed answer is the text
    that an engine alone makes of the prompt; each refusal has the right status and a message in OpenAI's shape; the server's
    memory stays flat; SIGTERM lets open requests end and the process leaves with status 0.
    """

    name = "serve"

    load: str
    """folder of checkpoints"""
    requests: int = 1000
    concurrency: int = 32
    """requests at a time"""
    max_batch: int = 8
    """of the server"""
    max_queue: int = 16
    """of the server; small, so that 429 comes up"""
    num_threads: int = 1
    """of the server"""
    longest: int = 48
    """most tokens of an answer"""
    seed: int = 0
    skip_sigterm: bool = False
    """end the server when nothing is open"""

    def run(self) -> int:
        plan = make_plan(self.requests, self.longest, self.seed)
        expected, context = expected_texts(self.load, plan.wanted)
        sizes = {"max-batch": self.max_batch, "max-queue": self.max_queue, "num-threads": self.num_threads}
        flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        flags += ["--load", self.load, "--drain-timeout", "60"]
        with tempfile.TemporaryDirectory() as folder, ServerProcess(flags, Path(folder)) as server:
            result = run_plan(server, plan, expected, context, self.concurrency)
            if not self.skip_sigterm:
                result["sigterm"] = sigterm_under_load(server, plan, expected, self.concurrency)
            result["exit_status"] = server.end()
            result["log"] = server.log()
        show(result)
        self.write_json(result)
        return 1 if wrong(result) else 0


def expected_texts(load: str, wanted: list[Wanted]) -> tuple[dict[Wanted, str], int]:
    """Returns what an engine that has one request at a time makes of each (prompt, max_tokens), and its context."""
    loaded = load_model(open_folder(load), single_process_state())
    engine, found = Engine(loaded, max_batch=1), {}
    for prompt, max_tokens in wanted:
        engine.submit(Request(loaded.tokenizer.encode(prompt), SamplingOptions(max_tokens, temperature=0.0)))
        text = ""
        while engine.has_work:
            text += "".join(event.text for event in engine.step())
        found[prompt, max_tokens] = text
    return found, engine.context_length


def wrong(result: Row) -> list[str]:
    """Returns what was not as it should be."""
    faults = list(result["faults"]) + list(result.get("sigterm", {}).get("faults", ()))
    if result["exit_status"] != 0:
        faults.append(f"the server left with status {result['exit_status']}")
    if result["open_at_end"]:
        faults.append(f"{result['open_at_end']:.0f} answers were still open with no client left")
    if "Traceback" in result["log"]:
        faults.append("the server's log has a traceback")
    return faults


def show(result: Row) -> None:
    """Prints tables."""
    heading = ["kind", "requests", "right", "status", "429 before"]
    print(format_table([heading, *([str(cell) for cell in row] for row in result["kinds"])]))
    memory = "  ".join(f"{share:.0%} {mib:.1f}" for share, mib in result["memory_mib"])
    print(f"\nserver's resident memory, MiB, after so much of the load: {memory}")
    num_requests = sum(row[1] for row in result["kinds"])
    print(
        f"{num_requests} requests in {result['time_s']:.1f} s, {result['tokens']:.0f} tokens made, answers: median "
        f"{result['median_s']:.2f} s, 95 % within {result['p95_s']:.2f} s; first token of streams: median "
        f"{result['first_median_s']:.2f} s"
    )
    if "sigterm" in result:
        print(f"SIGTERM under load: {result['sigterm']['counts']}, ended in {result['sigterm']['time_s']:.1f} s")
    print(f"exit status {result['exit_status']}")
    faults = wrong(result)
    print("\n".join(["wrong:", *faults[:20]]) if faults else "nothing was wrong")
