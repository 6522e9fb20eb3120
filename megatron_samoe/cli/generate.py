"""Prints text that follows prompts: `megatron-samoe generate --load runs/quickstart/samoe/checkpoints --prompt "Emma was"`."""

from __future__ import annotations

import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from megatron_samoe.cli.model_arguments import EngineOptions, ModelOptions, rank_program
from megatron_samoe.cli.program import Count
from megatron_samoe.convert.opener import format_of
from megatron_samoe.datasets.chat_prompt import chat_prompt
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import ConfigError, DataError, MegatronSamoeError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import FinishReason, Request
from megatron_samoe.inference.sampling import SamplingOptions, check_sampling
from megatron_samoe.parallel_state import ParallelState
from megatron_samoe.parsing import parse_json, read_text


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given: text, ids or the messages of a conversation.

    Attributes:
        source: the file and line, for messages; empty for the only one.
    """

    text: str
    ids: tuple[Any, ...] | None = None
    source: str = ""
    messages: tuple[dict[str, Any], ...] | None = None

    def after(self, history: Sequence[dict[str, Any]]) -> Prompt:
        """Returns the prompt as a user's message after others; ConfigError where it is ids."""
        if self.ids is not None:
            raise ConfigError(
                f"{self.source}: prompt_ids", self.ids, "are not for --chat, whose template makes the ids"
            )
        own = ({"role": "user", "content": self.text},) if self.messages is None else self.messages
        return replace(self, messages=(*history, *own))

    def request(self, tokenizer: Tokenizer, sampling: SamplingOptions) -> Request:
        """Returns the request for it.

        Raises:
            ConfigError: the text is not valid Unicode: its bytes were not UTF-8.
        """
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                "prompt", self.text, f"must be UTF-8 text, and is not at character {error.start}"
            ) from None
        if self.messages is not None:
            return Request(chat_prompt(tokenizer, self.messages), sampling)
        return Request(tokenizer.encode(self.text) if self.ids is None else self.ids, sampling)


def read_prompts(file: TextIO, name: str, as_json: bool) -> list[Prompt]:
    """Returns the prompts of a file, without blank lines.

    Raises:
        DataError: a line is not an object with "prompt", "prompt_ids" or "messages", or the file has no prompt.
    """
    prompts = []
    try:
        for number, line in enumerate(file, 1):
            if line.strip():
                source = f"{name}, line {number}"
                prompts.append(_from_json(line, source) if as_json else Prompt(line.rstrip("\r\n"), source=source))
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if not prompts:
        raise DataError(f"{name} holds no prompt.")
    return prompts


def _from_json(line: str, source: str) -> Prompt:
    wanted = f'{source}: must be a JSON object with a text "prompt", a list of numbers "prompt_ids", or with --chat "messages"'
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{wanted}, but is not JSON: {error}.") from None
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return Prompt(value["prompt"], source=source)
    if isinstance(value, dict) and isinstance(value.get("prompt_ids"), list):
        return Prompt("", tuple(value["prompt_ids"]), source)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return Prompt("", None, source, tuple(value["messages"]))
    raise DataError(f"{wanted}.")


@dataclass
class Result:
    """The answer to a prompt so far, and how many characters of the prompt and of it have been shown."""

    prompt: Prompt
    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    shown: int = 0


class Printer:
    """Shows results in the order of the prompts: the first one that is not complete as it comes, others when it is done."""

    def __init__(self, prompts: Sequence[Prompt], options: Generate):
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
                complete = (first.prompt.text if first.prompt.messages is None else "") + first.text
                print(complete[first.shown :], end="\n" if done else "", flush=True)
                first.shown = len(complete)
            if not done:
                return
            self._left.popleft()

    def _print_json(self, result: Result) -> None:
        prompt = result.prompt
        asked = {"prompt": prompt.text} if prompt.ids is None else {"prompt_ids": list(prompt.ids)}
        asked = asked if prompt.messages is None else {"messages": list(prompt.messages)}
        made = {"text": result.text, "finish_reason": result.reason, "ids": result.ids}
        print(json.dumps({**asked, **made}, ensure_ascii=False), flush=True)


_ONE = tyro.conf.create_mutex_group(required=False, title="prompts")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Prints text that follows prompts.

    Prompts come from --prompt, from a file (a prompt a line; in .jsonl files objects with "prompt" or "prompt_ids"), from
    standard input, or one after another at a terminal. Those of a file are generated together, in batches that requests enter
    and leave as they come and end. Under torchrun the model is spread over the ranks, whichever layout saved the checkpoint.

    With --chat, prompts are what a user says to a model with a chat template; each of a file begins a conversation, those of a
    terminal continue one.
    """

    model: ModelOptions
    prompt: Annotated[str | None, _ONE] = None
    """the only prompt"""
    prompts_file: Annotated[str | None, _ONE, tyro.conf.arg(metavar="FILE")] = None
    """a prompt a line, or .jsonl; - for standard input"""
    interactive: Annotated[bool, _ONE] = False
    """ask for prompts until the end of input; so it is without any of these at a terminal, else standard input is read"""
    chat: bool = False
    """print the model's answers; .jsonl files may hold "messages", each with a "role" and a "content\""""
    system: str | None = None
    """with --chat, the system message, before the first one"""
    no_stream: bool = False
    """print a text when it is complete, not as it comes"""
    json: bool = False
    """print a JSON object for each prompt, when it is complete"""
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(temperature=0.8, top_k=40))
    """How tokens are chosen. --seed is of the first prompt; each other prompt's is one more than that before it."""
    engine: EngineOptions
    num_threads: Count = None
    """CPU threads of a rank"""

    def run(self) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal has not all of Unicode
        try:
            self._generate()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # whoever read the output has gone
            sys.stdout = None  # type: ignore[assignment]
        return 0

    def _generate(self) -> None:
        check_sampling(self.sampling)
        if self.system is not None and not self.chat:
            raise ConfigError("--system", self.system, "needs --chat")
        history = [{"role": "system", "content": self.system}] if self.system is not None else []
        parallel = self.model.join(self.num_threads)
        prompts, problem = None, None
        if parallel.rank == 0:
            try:
                format_of(self.model.load, LoadWords())  # before a prompt is waited for
                prompts = self._given_prompts()
            except MegatronSamoeError as error:
                problem = str(error)
        prompts, problem = parallel.world.all_gather_object((prompts, problem))[0]
        if problem is not None:
            raise DataError(problem, collective=True)
        loaded = self.model.loaded(parallel, combine=False)
        if self.chat and loaded.tokenizer.chat.template is None:
            raise ConfigError(
                "--chat", True, "the model has no chat template: it is a base model, which continues texts"
            )
        engine = Engine(loaded, **vars(self.engine))
        directory = loaded.directory
        del loaded  # of which the engine keeps what it needs
        if prompts is not None:
            prompts = [prompt.after(history) for prompt in prompts] if self.chat else prompts
            generate(engine, prompts, self, parallel.rank == 0)
            return
        if parallel.rank == 0:
            print(f"{directory}: {engine.summary}; a prompt a line", file=sys.stderr)
        turns = list(history)
        for number, given in enumerate(_ask(parallel)):
            prompt = given.after(turns) if self.chat else given
            try:
                (answer,) = generate(engine, [prompt], self, parallel.rank == 0, number)
                turns = [*(prompt.messages or ()), {"role": "assistant", "content": answer}]
            except ConfigError as error:
                if parallel.rank == 0:
                    print(f"error: {error}{'; the conversation begins anew' * self.chat}", file=sys.stderr)
                turns = list(history)

    def _given_prompts(self) -> list[Prompt] | None:
        """Returns the prompts that are known at the start; None where they are asked for."""
        if self.prompt is not None:
            return [Prompt(self.prompt)]
        if self.prompts_file not in (None, "-"):
            path = Path(self.prompts_file)
            try:
                return read_prompts(io.StringIO(read_text(path, None)), str(path), path.suffix == ".jsonl")
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
        if self.interactive or (self.prompts_file is None and sys.stdin.isatty()):
            return None
        return read_prompts(sys.stdin, "standard input", as_json=False)


def generate(
    engine: Engine, prompts: Sequence[Prompt], options: Generate, shows: bool, num_before: int = 0
) -> list[str]:
    """Generates for some prompts together, prints what comes where `shows`, and returns the texts.

    Args:
        num_before: prompts that were generated for before, which had the seeds before these.

    Raises:
        ConfigError: a prompt is empty, too long or has unknown tokens; nothing is generated then.
    """
    sampling = options.sampling
    numbers: dict[int, int] = {}
    texts = [""] * len(prompts)
    try:
        for number, prompt in enumerate(prompts):
            own = replace(sampling, seed=(sampling.seed + num_before + number) % 2**64)
            try:
                numbers[engine.submit(prompt.request(engine.tokenizer, own))] = number
            except ConfigError as error:
                field = f"{prompt.source}: {error.field}" if prompt.source else error.field
                raise ConfigError(field, error.value, error.allowed) from None
        printer = Printer(prompts, options)
        while engine.has_work:
            for event in engine.step():
                texts[numbers[event.request_id]] += event.text
                if shows:
                    printer.take(numbers[event.request_id], event.token_id, event.text, event.finish_reason)
    finally:
        for request_id in numbers:
            engine.cancel(request_id)
    return texts


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


main = rank_program(Generate)

if __name__ == "__main__":
    sys.exit(main())
