"""OpenAI's completions API as plain values: what a request body means, and the bodies of errors.

Nothing here knows of a web server or an engine, so every rule is tested without either. The field names and shapes are
those of OpenAI's API reference for `/v1/completions`; `top_k`, `repetition_penalty` and `ignore_eos` are names that
other servers of this API have added. `chat_protocol` is the same for chats, `answers` has the bodies of answers.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import ConfigError, ConfigErrors, nearest, shown
from megatron_samoe.inference.request import MOST_LOGPROBS, Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions, check_sampling

#: max_tokens where a request does not say, as OpenAI's.
DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 4
FIELDS = tuple(
    "model prompt max_tokens n temperature top_p top_k repetition_penalty stop seed echo logprobs stream stream_options "
    "ignore_eos user".split()
)
#: Fields that name who asks, or an answer's use, and change no answer.
LABELS = ("user", "safety_identifier", "prompt_cache_key")
#: Fields of the API that this server has no code for, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "suffix": (None, ""),
}
_TOO_LONG = "context_length_exceeded"
#: How an option of the engine is called in this API.
NAMES = {"max_new_tokens": "max_tokens", "ignore_eod": "ignore_eos"}


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is not answered, as the client sees it.

    Attributes:
        status: of HTTP.
        kind: OpenAI's "type".
        param: field of the request that is at fault.
        code: a word that programs can test.
        retry_after_s: when to try again.
        allow: methods that the path takes.
    """

    status: int
    message: str
    _: KW_ONLY
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    allow: str | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients expect it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Header fields."""
        retry = None if self.retry_after_s is None else str(self.retry_after_s)
        known = "Bearer" if self.status == 401 else None
        ends = "close" if self.status in (408, 413) else None  # part of the body may still be on its way
        headers = {"Retry-After": retry, "Allow": self.allow, "WWW-Authenticate": known, "Connection": ends}
        return {name: value for name, value in headers.items() if value is not None}


@dataclass(frozen=True)
class ModelFacts:
    """The limits that requests are checked against.

    Attributes:
        name: as in "model".
        cache_tokens: that the engine's key-value cache holds.
        max_choices: most prompts times choices of one request.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    context_length: int
    cache_tokens: int
    max_choices: int


@dataclass(frozen=True)
class CompletionCall:
    """A checked request.

    Attributes:
        requests: one per choice of the answer: all choices of the first prompt, then of the second.
        heads: text that each choice's answer begins with: its prompt where "echo" is set.
        prompt_tokens: of all prompts, each counted once.
        tells_logprobs: whether answers hold log-probabilities, with "echo" of the prompt's tokens, too.
        adds_tokens: whether answers continue the prompt; else the engine's one token is not sent ("max_tokens" 0).
        include_usage: whether a stream ends with the numbers of tokens.
    """

    requests: tuple[Request, ...]
    heads: tuple[str, ...]
    prompt_tokens: int
    stream: bool
    include_usage: bool
    tells_logprobs: bool
    adds_tokens: bool

    def shown(self, event: TokenEvent) -> TokenEvent:
        """Returns a token's part of an answer."""
        return event if self.adds_tokens else event._replace(text="", finish_reason="length")


def parse_body(raw: bytes) -> dict[str, Any]:
    """Returns the JSON object of a request.

    Raises:
        ApiError: it is not JSON, names a field twice, or is not an object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"it gives {_shown(Counter(name for name, _ in pairs).most_common(1)[0][0])} twice")
        return found

    try:
        body = json.loads(raw, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(400, f"The request's body is not JSON in UTF-8: {reason}.", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, 'The request\'s body must be a JSON object such as {"prompt": "Once"}.')
    return body


def parse_completion(body: Mapping[str, Any], facts: ModelFacts) -> CompletionCall:
    """Returns the engine's requests that a body asks for.

    Raises:
        ApiError: a field is unknown or unsupported, has a value that is not allowed, or the prompt does not fit.
    """
    check_fields(body, FIELDS, UNSUPPORTED)
    stream, echo, include_usage = flag(body, "stream"), flag(body, "echo"), wants_usage(body)
    given = given_prompts(body)
    n = num_choices(body, len(given), facts)
    texts, prompts = encoded(given, facts)
    options, logprobs, asked = sampling_options(body), num_logprobs(body, "logprobs"), body.get("max_tokens")
    if type(asked) is int and asked == 0 and not echo:
        raise bad_value("max_tokens", asked, 'asks for nothing without "echo": true, which gives the prompt back')
    requests, heads = [], []
    for number, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        # The engine makes one token in any case.
        allowed = max_new_tokens("max_tokens", asked, len(ids), facts, least=0, default=DEFAULT_MAX_TOKENS) or 1
        for choice in range(n):
            seed = (options["seed"] + number * n + choice) % 2**64
            sampling = SamplingOptions(**{**options, "seed": seed, "max_new_tokens": allowed})
            requests.append(Request(ids, sampling, logprobs, scores_prompt=echo and logprobs is not None))
            heads.append((facts.tokenizer.decode(ids) if text is None else text) if echo else "")
    tokens, tells = sum(map(len, prompts)), logprobs is not None
    return CompletionCall(tuple(requests), tuple(heads), tokens, stream, include_usage, tells, asked != 0)


def _shown(value: Any) -> str:
    # What json.loads has just read may be nested deeper than json.dumps writes.
    text = shown(value) if isinstance(value, (list, dict)) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def bad_value(name: str, value: Any, allowed: str) -> ApiError:
    """Returns the refusal of a field's value."""
    return ApiError(400, f"{name} = {_shown(value)}: {allowed}.", param=name)


def given_value(body: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a field; null means that it is not given."""
    value = body.get(name)
    return default if value is None else value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Returns a field that is true or false; false if not given."""
    value = given_value(body, name, False)
    if not isinstance(value, bool):
        raise bad_value(name, value, "must be true or false")
    return value


def check_fields(body: Mapping[str, Any], fields: Sequence[str], unsupported: Mapping[str, Sequence[Any]]) -> None:
    """Raises ApiError for a field that is not known, or asks for what the server cannot do.

    Args:
        unsupported: fields of the API that have no code here, with the values that ask for nothing.
    """
    for name, value in body.items():
        if isinstance(value, int) and abs(value) >= 2**64:  # Python refuses to write a sum of 4,300 digits
            raise bad_value(name[:60], value, "is too large a number")
        if name in unsupported:
            if not any(type(value) is type(idle) and value == idle for idle in unsupported[name]):
                said = f"{name} is not supported by this server: leave it out."
                raise ApiError(400, said, param=name, code="unsupported_field")
        elif name not in fields:
            said = f"{_shown(name)} is not a field of such a request.{nearest(name, fields)}"
            raise ApiError(400, f"{said} Known are {', '.join(fields)}.", param=name[:60], code="unknown_field")
        elif name in LABELS and not isinstance(value, str | None):
            raise bad_value(name, value, "must be text")
        elif name in LABELS and value is not None:
            encodable(name, value)


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Returns whether a stream is to end with the numbers of tokens."""
    options = given_value(body, "stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise bad_value("stream_options", options, 'may hold "include_usage" only')
    if options and not flag(body, "stream"):
        raise bad_value("stream_options", options, 'needs "stream": true')
    return flag(options, "include_usage")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def given_prompts(body: Mapping[str, Any]) -> list[Any]:
    """Returns the prompts as they were given, not yet checked one by one."""
    value = body.get("prompt")
    if value is None:
        raise ApiError(400, "prompt is missing: a text, tokens, or a list of either.", param="prompt")
    given = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(given, list) or not given:
        raise bad_value("prompt", value, "must be a text, tokens, or a list of either")
    return given


def encoded(given: list[Any], facts: ModelFacts) -> tuple[list[str | None], list[list[int]]]:
    """Returns each prompt's text (None where tokens were given) and tokens; ApiError where one is not of the vocabulary."""
    texts, prompts = [], []
    for prompt in given:
        if isinstance(prompt, str):
            ids = facts.tokenizer.encode(encodable("prompt", prompt))
            if not ids:
                raise bad_value("prompt", prompt, "must hold at least one token")
        elif _is_tokens(prompt):
            ids = prompt
        else:
            raise bad_value("prompt", prompt, "each must be a text or a list of whole numbers that is not empty")
        outside = next((i for i in ids if not 0 <= i < facts.vocab_size), None)
        if outside is not None:
            raise bad_value("prompt", outside, f"tokens must be whole numbers from 0 to {facts.vocab_size - 1}")
        texts.append(prompt if isinstance(prompt, str) else None)
        prompts.append(ids)
    return texts, prompts


def encodable(name: str, text: str) -> str:
    """Returns a field's text; ApiError for any other type."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{name} has half a surrogate pair at character {error.start}, which is not text."
        raise ApiError(400, said, param=name) from error
    return text


def num_logprobs(body: Mapping[str, Any], name: str) -> int | None:
    """Returns the number of most probable tokens that an answer shows at each position."""
    value = body.get(name)
    if value is not None and not (type(value) is int and 0 <= value <= MOST_LOGPROBS):
        raise bad_value(name, value, f"must be a whole number from 0 to {MOST_LOGPROBS}")
    return value


def num_choices(body: Mapping[str, Any], num_prompts: int, facts: ModelFacts) -> int:
    """Returns the choices of each prompt."""
    n = given_value(body, "n", 1)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise bad_value("n", n, "must be a whole number, 1 or more")
    if num_prompts * n > facts.max_choices:
        asked = f"The request asks for {num_prompts * n} choices ({num_prompts} prompts, n = {n})"
        raise ApiError(400, f"{asked}; this server makes at most {facts.max_choices} for one request.", param="n")
    return n


def max_new_tokens(
    name: str, given: Any, prompt_tokens: int, facts: ModelFacts, *, least: int, default: int, prompt: str = "prompt"
) -> int:
    """Returns the most new tokens for a prompt, as OpenAI counts: prompt and answer share the context.

    Args:
        name, given: the field that says them, and its value.
        default: most where that says nothing.
        prompt: the field of the prompt.
    """
    room = facts.context_length - prompt_tokens
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < least):
        raise bad_value(name, given, f"must be a whole number, {least} or more")
    wanted = 1 if given is None else given
    if wanted > room:
        said = f"The model's context has {facts.context_length} tokens, and the request needs {prompt_tokens + wanted}"
        said += f": {prompt_tokens} of the prompt and {wanted} to generate."
        raise ApiError(400, said, param=prompt if room < 1 else name, code=_TOO_LONG)
    allowed = min(default, room) if given is None else given
    # The engine refuses it as well, but hears of it only when a stream has begun. The last token takes no position.
    needed = prompt_tokens + max(allowed, 1) - 1
    if needed > facts.cache_tokens:
        said = f"The server's key-value cache has {facts.cache_tokens} tokens, and the request needs {needed}"
        said += f": {prompt_tokens} of the prompt and {allowed} to generate, but for the last."
        raise ApiError(400, said, param=name, code=_TOO_LONG)
    return allowed


def sampling_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the engine's options, except max_new_tokens."""
    stop = given_value(body, "stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise bad_value("stop", stop, f"must be a text or a list of at most {MAX_STOPS} texts, none of them empty")
    top_k = given_value(body, "top_k", 0)
    options = {
        "temperature": given_value(body, "temperature", 1.0),
        "top_p": given_value(body, "top_p", 1.0),
        "top_k": 0 if top_k == -1 and type(top_k) is int else top_k,  # -1 for all is what other servers take
        "repetition_penalty": given_value(body, "repetition_penalty", 1.0),
        "stop": tuple(encodable("stop", s) for s in stop),
        "seed": given_value(body, "seed", secrets.randbits(63)),
        "ignore_eod": flag(body, "ignore_eos"),
    }
    try:
        check_sampling(SamplingOptions(**options))
    except ConfigErrors as errors:
        raise api_error(errors.errors[0]) from errors
    return options


def api_error(error: ConfigError) -> ApiError:
    """Returns the engine's refusal of a request under the names of this API."""
    name = NAMES.get(error.field, error.field)
    return ApiError(400, f"{name} = {_shown(error.value)}: {error.allowed}.", param=name)
