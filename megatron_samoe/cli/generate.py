"""Prints text that follows prompts: `megatron-samoe generate --load runs/quickstart/samoe/checkpoints --prompt "Emma was"`.

Prompts come from --prompt, from a file (a prompt a line; in .jsonl files objects with "prompt" or "prompt_ids"), from
standard input, or one after another at a terminal. Those of a file are generated together, in batches that requests enter
and leave as they come and end. Under torchrun the model is spread over the ranks, whichever layout saved the checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from megatron_samoe.cli.arguments import Options, Words, adder, text_parser
from megatron_samoe.cli.model_arguments import add_layout_arguments, add_model_arguments, join, load, rank_program
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import ConfigError, DataError, MegatronSamoeError
from megatron_samoe.inference.engine import PRECISIONS, SERVINGS, Engine
from megatron_samoe.inference.request import FinishReason, Request
from megatron_samoe.inference.sampling import SamplingOptions, check_sampling
from megatron_samoe.parallel_state import ParallelState
from megatron_samoe.parsing import parse_json


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given; either text or ids.

    Attributes:
        place: where it stands, for messages; empty for the only one.
    """

    text: str
    ids: tuple[Any, ...] | None = None
    place: str = ""

    def request(self, tokenizer: Tokenizer, sampling: SamplingOptions) -> Request:
        """Returns the request for it.

        Raises:
            ConfigError: the text is not valid Unicode: its bytes were not UTF-8.
        """
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                "prompt", self.text, f"must be UTF-8 text, and is none at character {error.start}"
            ) from None
        return Request(tokenizer.encode(self.text) if self.ids is None else self.ids, sampling)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    add_model_arguments(parser)
    source = adder(parser.add_mutually_exclusive_group())
    source("--prompt", str, "the only prompt")
    source("--prompts-file", str, "a prompt a line, or .jsonl; - for standard input", metavar="FILE")
    source("--interactive", bool, "ask for prompts until the end of input; so it is "
                        "without any of these at a terminal, else standard input is read")  # fmt: skip
    usual = SamplingOptions(temperature=0.8, top_k=40)
    sampling = adder(parser.add_argument_group("choice of tokens"))
    for name, text in (
        ("max_new_tokens", "most tokens to generate"),
        ("temperature", "0 takes the most probable token"),
        ("top_k", "sample among so many most probable tokens; 0 for all"),
        ("top_p", "sample among the fewest tokens that hold this probability"),
        ("repetition_penalty", "above 1 makes tokens that occurred less probable"),
        ("seed", "of the first prompt; each other prompt's is one more than that before it"),
    ):
        default = getattr(usual, name)
        sampling(f"--{name.replace('_', '-')}", default, f"{text} (default: {default})", metavar="N")  # fmt: skip
    sampling("--stop", [str], "texts that end the result, not in it", default=(), metavar="TEXT")
    sampling("--ignore-eod", bool, "generate on after an end-of-document token")
    output = adder(parser.add_argument_group("output"))
    output("--no-stream", bool, "print a text when it is complete, not as it comes")
    output("--json", bool, "print a JSON object for each prompt, when it is complete")
    engine_group = parser.add_argument_group("engine")
    engine = adder(engine_group)
    engine("--serving", SERVINGS, "how the experts of a shared pool are kept", default="auto")
    engine("--dtype", PRECISIONS, "of weights; the checkpoint's if not given", default=None)
    engine("--cache-experts", int, "experts combined on the fly that are kept", metavar="N")
    engine(
        "--weights-folder",
        str,
        "keep weights in a file there, which Linux may drop from memory and read again; so "
        "they may be larger than memory while text is made",
        metavar="DIR",
    )
    engine("--max-batch", 8, "prompts generated at the same time", metavar="N")
    engine("--max-tokens", int, "tokens that the key-value cache holds", metavar="N")
    engine("--num-threads", int, "CPU threads of a rank", metavar="N")
    add_layout_arguments(engine_group)
    return parser


def read_prompts(file: TextIO, name: str, as_json: bool) -> list[Prompt]:
    """Returns the prompts of a file; blank lines are none.

    Raises:
        DataError: a line is no object with "prompt" or "prompt_ids", or the file has no prompt.
    """
    prompts = []
    try:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{name}, line {number}"
                prompts.append(_from_json(line, place) if as_json else Prompt(line.rstrip("\r\n"), place=place))
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if not prompts:
        raise DataError(f"{name} holds no prompt.")
    return prompts


def _from_json(line: str, place: str) -> Prompt:
    wanted = f'{place}: must be a JSON object with a text "prompt" or a list of numbers "prompt_ids"'
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{wanted}, but is no JSON: {error}.") from None
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return Prompt(value["prompt"], place=place)
    if isinstance(value, dict) and isinstance(value.get("prompt_ids"), list):
        return Prompt("", tuple(value["prompt_ids"]), place)
    raise DataError(f"{wanted}.")


def _given_prompts(options: Options) -> list[Prompt] | None:
    """Returns the prompts that are known at the start; None where they are asked for."""
    if options.prompt is not None:
        return [Prompt(options.prompt)]
    if options.prompts_file not in (None, "-"):
        path = Path(options.prompts_file)
        try:
            with path.open(encoding="utf-8") as file:
                return read_prompts(file, str(path), path.suffix == ".jsonl")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if options.interactive or (options.prompts_file is None and sys.stdin.isatty()):
        return None
    return read_prompts(sys.stdin, "standard input", as_json=False)


@dataclass
class Result:
    """What has come for a prompt, and how many characters of the prompt and of it have been shown."""

    prompt: Prompt
    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    shown: int = 0


class Printer:
    """Shows results in the order of the prompts: the first one that is not complete as it comes, others when it is done."""

    def __init__(self, prompts: Sequence[Prompt], options: Options):
        self._json, self._stream = options.json, not (options.no_stream or options.json)
        self._results = [Result(prompt) for prompt in prompts]
        self._left = deque(self._results)

    def take(self, number: int, token: int, text: str, reason: FinishReason | None) -> None:
        """Takes a token of a prompt."""
        result = self._results[number]
        result.text += text
        result.ids.append(token)
        result.reason = reason
        while self._left:
            first = self._left[0]
            done = first.reason is not None
            if done and self._json:
                self._print_json(first)
            elif done or self._stream:
                whole = first.prompt.text + first.text
                print(whole[first.shown :], end="\n" if done else "", flush=True)
                first.shown = len(whole)
            if not done:
                return
            self._left.popleft()

    def _print_json(self, result: Result) -> None:
        prompt = result.prompt
        asked = {"prompt": prompt.text} if prompt.ids is None else {"prompt_ids": list(prompt.ids)}
        made = {"text": result.text, "finish_reason": result.reason, "ids": result.ids}
        print(json.dumps({**asked, **made}, ensure_ascii=False), flush=True)


def generate(engine: Engine, prompts: Sequence[Prompt], options: Options, shows: bool, num_before: int = 0) -> None:
    """Generates for some prompts together and prints what comes where `shows`.

    Args:
        num_before: prompts that were generated for before, which had the seeds before these.

    Raises:
        ConfigError: a prompt is empty, too long or has unknown tokens; nothing is generated then.
    """
    sampling = _sampling(options)
    numbers: dict[int, int] = {}
    try:
        for number, prompt in enumerate(prompts):
            own = replace(sampling, seed=(sampling.seed + num_before + number) % 2**64)
            try:
                numbers[engine.submit(prompt.request(engine.tokenizer, own))] = number
            except ConfigError as error:
                field = f"{prompt.place}: {error.field}" if prompt.place else error.field
                raise ConfigError(field, error.value, error.allowed) from None
        printer = Printer(prompts, options)
        while engine.has_work:
            for event in engine.step():
                if shows:
                    printer.take(numbers[event.request_id], event.token_id, event.text, event.finish_reason)
    finally:
        for request_id in numbers:
            engine.cancel(request_id)


def _sampling(options: Options) -> SamplingOptions:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "ignore_eod")
    return SamplingOptions(stop=tuple(options.stop), **{name: getattr(options, name) for name in names})


def _ask(parallel: ParallelState) -> Iterator[Prompt]:
    """Yields prompts that rank 0 reads, on every rank, until the end of its input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one prompt is refused then, and the next one is asked for
    while True:
        line: str | None = None
        if parallel.rank == 0:
            with suppress(EOFError):
                line = input("> " if sys.stdin.isatty() else "")
        line = parallel.world.all_gather_object(line)[0]
        if line is None:
            return
        if line.strip():
            yield Prompt(line)


def _run(options: Options) -> None:
    check_sampling(_sampling(options))
    parallel = join(options, options.num_threads)
    prompts, problem = None, None
    if parallel.rank == 0:
        try:
            prompts = _given_prompts(options)
        except MegatronSamoeError as error:
            problem = str(error)
    prompts, problem = parallel.world.all_gather_object((prompts, problem))[0]
    if problem is not None:
        raise DataError(problem, collective=True)
    loaded = load(options, parallel, combine=False)
    engine = Engine(
        loaded, max_batch=options.max_batch, max_tokens=options.max_tokens, serving=options.serving,
        dtype=options.dtype, cache_experts=options.cache_experts,
        weights_folder=options.weights_folder,
    )  # fmt: skip
    directory = loaded.directory
    del loaded  # of which the engine keeps what it needs
    if prompts is not None:
        generate(engine, prompts, options, parallel.rank == 0)
        return
    if parallel.rank == 0:
        print(f"{directory}: {engine.summary}; a prompt a line", file=sys.stderr)
    for number, prompt in enumerate(_ask(parallel)):
        try:
            generate(engine, [prompt], options, parallel.rank == 0, number)
        except ConfigError as error:
            if parallel.rank == 0:
                print(f"error: {error}", file=sys.stderr)


@rank_program
def main(words: Words) -> int:
    """Runs the command and returns its exit status."""
    options = make_parser().parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal has not all of Unicode
    try:
        _run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        sys.stdout = None  # type: ignore[assignment]
    return 0


if __name__ == "__main__":
    sys.exit(main())
