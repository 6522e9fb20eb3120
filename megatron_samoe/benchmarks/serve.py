"""Loads a server as many careless clients would, and checks every answer: `megatron-samoe benchmark serve --load CHECKPOINTS`.

It starts the server, sends requests so many at a time over 127.0.0.1, and ends it by SIGTERM under load. Requests
are of all kinds: greedy completions of mixed lengths, streamed and whole; clients that vanish; JSON that is none;
prompts beyond the context; bodies beyond the limit; unknown fields, models and paths. Checked: each completed answer is
the text that an engine alone makes of the prompt; each refusal has the right status and a message in OpenAI's shape;
the server's memory stays flat; SIGTERM lets open requests end and the process leaves with status 0.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_samoe.benchmarks.common import Row, add_alone, write_json
from megatron_samoe.benchmarks.serve_load import ServerProcess, make_plan, run_plan, sigterm_under_load, summary
from megatron_samoe.cli.arguments import Options
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import load_model


def expected_texts(load: str, wanted: list[tuple[str, int]]) -> tuple[dict[tuple[str, int], str], int]:
    """Returns what an engine that has one request at a time makes of each (prompt, max_tokens), and its context."""
    loaded = load_model(load, single_process_state())
    engine, found = Engine(loaded, max_batch=1), {}
    for prompt, max_tokens in wanted:
        engine.submit(Request(loaded.tokenizer.encode(prompt), SamplingOptions(max_tokens, temperature=0.0)))
        text = ""
        while engine.has_work:
            text += "".join(event.text for event in engine.step())
        found[prompt, max_tokens] = text
    return found, engine.context_length


def run(options: Options) -> int:
    """Runs the load and returns 0 if nothing was wrong."""
    plan = make_plan(options.requests, options.longest, options.seed)
    expected, context = expected_texts(options.load, plan.wanted)
    flags = ["--load", options.load, "--max-batch", str(options.max_batch), "--max-queue", str(options.max_queue),
             "--num-threads", str(options.num_threads), "--drain-timeout", "60"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ServerProcess(flags, Path(folder)) as server:
        result = summary(run_plan(server, plan, expected, context, options.concurrency), server)
        if not options.skip_sigterm:
            result["sigterm"] = sigterm_under_load(server, plan, expected, options.concurrency)
        result["exit_status"] = server.end()
        result["log"] = server.log()
    show(result)
    write_json(options.json, result)
    return 1 if wrong(result) else 0


def add_parser(commands: Any) -> None:
    """Adds the subcommand `serve`."""
    add = add_alone(commands, "serve", "a server under the load of careless clients", run, description=__doc__)
    add("--load", str, "folder of checkpoints", required=True)
    add("--requests", 1000)
    add("--concurrency", 32, "requests at a time")
    add("--max-batch", 8, "of the server")
    add("--max-queue", 16, "of the server; small, so that 429 comes up")
    add("--num-threads", 1, "of the server")
    add("--longest", 48, "most tokens of an answer")
    add("--seed", 0)
    add("--skip-sigterm", bool, "end the server when nothing is open")
    add("--json", Path, "write the results here too")


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
    print(f"{num_requests} requests in {result['time_s']:.1f} s, {result['tokens']:.0f} tokens made, answers: median "
          f"{result['median_s']:.2f} s, 95 % within {result['p95_s']:.2f} s; first token of streams: median "
          f"{result['first_median_s']:.2f} s")  # fmt: skip
    if "sigterm" in result:
        print(f"SIGTERM under load: {result['sigterm']['counts']}, ended in {result['sigterm']['time_s']:.1f} s")
    print(f"exit status {result['exit_status']}")
    faults = wrong(result)
    print("\n".join(["wrong:", *faults[:20]]) if faults else "nothing was wrong")
