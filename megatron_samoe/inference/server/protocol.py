"""OpenAI's completions API as plain values: what a request body means, and the bodies of answers and errors.

Nothing here knows of a web server or an engine, so every rule is tested without either. The field names and shapes are
those of OpenAI's API reference for `/v1/completions`; `top_k`, `repetition_penalty` and `ignore_eos` are names that
other servers of this API have added.
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
from megatron_samoe.inference.request import MOST_LOGPROBS, Request, TokenEvent, TokenScore
from megatron_samoe.inference.sampling import SamplingOptions, check_sampling

#: max_tokens where a request does not say, as OpenAI's.
DEFAULT_MAX_TOKENS = 16
MAX_STOPS = 4
#: Fields with an effect, and "user", which names who asks and changes no answer.
FIELDS = tuple(
    "model prompt max_tokens n temperature top_p top_k repetition_penalty stop seed echo logprobs stream stream_options "
    "ignore_eos user".split()
)
#: Fields of the API that this server has no code for, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
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
        """Header fields beside the body."""
        retry = None if self.retry_after_s is None else str(self.retry_after_s)
        known = "Bearer" if self.status == 401 else None
        headers = {"Retry-After": retry, "Allow": self.allow, "WWW-Authenticate": known}
        return {name: value for name, value in headers.items() if value is not None}


@dataclass(frozen=True)
class ModelFacts:
    """What requests are checked against.

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
        adds_tokens: whether answers go on after the prompt; else the engine's one token is not told ("max_tokens" 0).
        include_usage: whether a stream ends with the numbers of tokens.
    """

    requests: tuple[Request, ...]
    heads: tuple[str, ...]
    prompt_tokens: int
    stream: bool
    include_usage: bool
    tells_logprobs: bool
    adds_tokens: bool

    def told(self, event: TokenEvent) -> TokenEvent:
        """Returns what answers tell of a token."""
        return event if self.adds_tokens else event._replace(text="", finish_reason="length")


def parse_body(raw: bytes) -> dict[str, Any]:
    """Returns the JSON object of a request.

    Raises:
        ApiError: it is no JSON, names a field twice, or is not an object.
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
    _check_fields(body)
    stream, echo, include_usage = _flag(body, "stream"), _flag(body, "echo"), _include_usage(body)
    n = _value(body, "n", 1)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise _bad("n", n, "must be a whole number, 1 or more")
    given = given_prompts(body)
    if len(given) * n > facts.max_choices:
        asked = f"The request asks for {len(given) * n} choices ({len(given)} prompts, n = {n})"
        raise ApiError(400, f"{asked}; this server makes at most {facts.max_choices} for one request.", param="n")
    texts, prompts = encoded(given, facts.tokenizer)
    check_tokens(prompts, facts.vocab_size)
    options, logprobs = _sampling(body), _logprobs(body)
    adds_tokens = body.get("max_tokens") != 0
    requests, heads = [], []
    for place, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        allowed = _max_tokens(body, len(ids), facts)
        for choice in range(n):
            seed = (options["seed"] + place * n + choice) % 2**64
            sampling = SamplingOptions(**{**options, "seed": seed, "max_new_tokens": allowed})
            requests.append(Request(ids, sampling, logprobs, scores_prompt=echo and logprobs is not None))
            heads.append((facts.tokenizer.decode(ids) if text is None else text) if echo else "")
    tokens, tells = sum(map(len, prompts)), logprobs is not None
    return CompletionCall(tuple(requests), tuple(heads), tokens, stream, include_usage, tells, adds_tokens)


def completion_body(call_id: str, created: int, model: str, choices: Sequence[dict], usage: dict | None) -> dict:
    """Returns an answer, or one piece of a streamed answer."""
    body = {"id": call_id, "object": "text_completion", "created": created, "model": model, "choices": list(choices)}
    return body if usage is None else {**body, "usage": usage}


def choice_body(index: int, text: str, finish_reason: str | None, logprobs: dict | None = None) -> dict:
    """Returns one choice of an answer."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class TokenTexts:
    """One choice's log-probabilities as OpenAI shows them: each token with its text and its place in the choice's text.

    Tokens may end within a character; a token's text is then a replacement sign, and two of "top_logprobs" may look alike, of
    which the more probable is kept.

    Args:
        prompt_ids: where the answer begins with its prompt.
        adds_tokens: see `CompletionCall`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), adds_tokens: bool = True):
        self._decode, self._prompt_ids, self._offset = tokenizer.decode, prompt_ids, 0
        self._adds_tokens = adds_tokens

    def body(self, event: TokenEvent) -> dict:
        """Returns the "logprobs" of a new token, with the first those of the prompt before it."""
        scores: list[TokenScore | None] = [event.score] if self._adds_tokens else []
        ids = [event.token_id] if self._adds_tokens else []
        if self._prompt_ids:
            # Nothing stands before the first token, so it has no probability.
            ids, scores = [*self._prompt_ids, *ids], [None, *event.prompt_scores, *scores]
            self._prompt_ids = ()
        texts = [self._decode([token]) for token in ids]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [score and score.logprob for score in scores],
            "top_logprobs": [score and self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token_id, score.logprob)):
            found.setdefault(self._decode([token]), logprob)
        return found


def joined_logprobs(parts: Sequence[dict]) -> dict | None:
    """Returns the "logprobs" of an answer from those of its tokens; None without any."""
    return {key: [value for part in parts for value in part[key]] for key in parts[0]} if parts else None


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict:
    """Returns the numbers of tokens of an answer."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _shown(value: Any) -> str:
    # What json.loads has just read may be nested deeper than json.dumps writes.
    text = shown(value) if isinstance(value, (list, dict)) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _bad(name: str, value: Any, allowed: str) -> ApiError:
    return ApiError(400, f"{name} = {_shown(value)}: {allowed}.", param=name)


def _value(body: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns a field; null means that it is not given."""
    value = body.get(name)
    return default if value is None else value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = _value(body, name, False)
    if not isinstance(value, bool):
        raise _bad(name, value, "must be true or false")
    return value


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if isinstance(value, int) and abs(value) >= 2**64:  # Python refuses to write a sum of 4,300 digits
            raise _bad(name[:60], value, "is too large a number")
        if name in UNSUPPORTED:
            if isinstance(value, bool) or value not in UNSUPPORTED[name]:
                told = f"{name} is not supported by this server: leave it out."
                raise ApiError(400, told, param=name, code="unsupported_field")
        elif name not in FIELDS:
            told = f"{_shown(name)} is no field of a completion request.{nearest(name, FIELDS)}"
            raise ApiError(400, f"{told} Known are {', '.join(FIELDS)}.", param=name[:60], code="unknown_field")
    if not isinstance(user := _value(body, "user", ""), str):
        raise _bad("user", user, "must be text")
    _encodable("user", user)


def _include_usage(body: Mapping[str, Any]) -> bool:
    options = _value(body, "stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise _bad("stream_options", options, 'may hold "include_usage" alone')
    if options and not _flag(body, "stream"):
        raise _bad("stream_options", options, 'needs "stream": true')
    return _flag(options, "include_usage")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def given_prompts(body: Mapping[str, Any]) -> list[Any]:
    """Returns the prompts as they were given, not yet checked one by one."""
    value = body.get("prompt")
    if value is None:
        raise ApiError(400, "prompt is missing: a text, tokens, or a list of either.", param="prompt")
    given = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(given, list) or not given:
        raise _bad("prompt", value, "must be a text, tokens, or a list of either")
    return given


def encoded(given: list[Any], tokenizer: Tokenizer) -> tuple[list[str | None], list[list[int]]]:
    """Returns each prompt's text (None where tokens were given) and tokens."""
    texts, prompts = [], []
    for prompt in given:
        if isinstance(prompt, str):
            ids = tokenizer.encode(_encodable("prompt", prompt))
            if not ids:
                raise _bad("prompt", prompt, "must hold at least one token")
        elif _is_tokens(prompt):
            ids = prompt
        else:
            raise _bad("prompt", prompt, "each must be a text or a list of whole numbers that is not empty")
        texts.append(prompt if isinstance(prompt, str) else None)
        prompts.append(ids)
    return texts, prompts


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        told = f"{name} has half a surrogate pair at character {error.start}, which is no text."
        raise ApiError(400, told, param=name) from error
    return text


def check_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ApiError where a token is none of the vocabulary."""
    for ids in prompts:
        outside = next((i for i in ids if not 0 <= i < vocab_size), None)
        if outside is not None:
            raise _bad("prompt", outside, f"tokens must be whole numbers from 0 to {vocab_size - 1}")


def _logprobs(body: Mapping[str, Any]) -> int | None:
    value = body.get("logprobs")
    if value is not None and not (type(value) is int and 0 <= value <= MOST_LOGPROBS):
        raise _bad("logprobs", value, f"must be a whole number from 0 to {MOST_LOGPROBS}")
    return value


def _max_tokens(body: Mapping[str, Any], prompt_tokens: int, facts: ModelFacts) -> int:
    """Returns the most new tokens for a prompt, as OpenAI counts: prompt and answer share the context."""
    room = facts.context_length - prompt_tokens
    given = body.get("max_tokens")
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise _bad("max_tokens", given, "must be a whole number, 0 or more")
    if given == 0 and not _flag(body, "echo"):
        raise _bad("max_tokens", given, 'asks for nothing without "echo": true, which gives the prompt back')
    wanted = 1 if given is None else given
    if wanted > room:
        told = f"The model's context has {facts.context_length} tokens, and the request needs {prompt_tokens + wanted}"
        told += f": {prompt_tokens} of the prompt and {wanted} to generate."
        raise ApiError(400, told, param="prompt" if room < 1 else "max_tokens", code=_TOO_LONG)
    # The engine makes one token in any case.
    allowed = min(DEFAULT_MAX_TOKENS, room) if given is None else max(given, 1)
    # The engine refuses it as well, but hears of it only when a stream has begun. The last token needs no place.
    needed = prompt_tokens + allowed - 1
    if needed > facts.cache_tokens:
        told = f"The server's key-value cache has {facts.cache_tokens} tokens, and the request needs {needed}"
        told += f": {prompt_tokens} of the prompt and {allowed} to generate, but for the last."
        raise ApiError(400, told, param="max_tokens", code=_TOO_LONG)
    return allowed


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the engine's options, but for max_new_tokens."""
    stop = _value(body, "stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise _bad("stop", stop, f"must be a text or a list of at most {MAX_STOPS} texts, none of them empty")
    top_k = _value(body, "top_k", 0)
    options = {
        "temperature": _value(body, "temperature", 1.0),
        "top_p": _value(body, "top_p", 1.0),
        "top_k": 0 if top_k == -1 and type(top_k) is int else top_k,  # -1 for all is what other servers take
        "repetition_penalty": _value(body, "repetition_penalty", 1.0),
        "stop": tuple(_encodable("stop", s) for s in stop),
        "seed": _value(body, "seed", secrets.randbits(63)),
        "ignore_eod": _flag(body, "ignore_eos"),
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
