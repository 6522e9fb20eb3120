"""OpenAI's chat completions API as plain values: what a request body means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_samoe.datasets.chat_prompt import chat_prompt
from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.inference.server.protocol import (
    LABELS,
    ApiError,
    CompletionCall,
    ModelFacts,
    api_error,
    bad_value,
    check_fields,
    flag,
    max_new_tokens,
    num_choices,
    num_logprobs,
    sampling_options,
    wants_usage,
)

#: Fields with an effect, and those that change no answer.
FIELDS = (
    *"model messages max_completion_tokens max_tokens n temperature top_p top_k repetition_penalty stop seed".split(),
    *"logprobs top_logprobs stream stream_options ignore_eos".split(),
    *LABELS,
)
#: Fields of the API that this server has no code for, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **{name: (None, 0, 0.0) for name in ("frequency_penalty", "presence_penalty")},
    **{name: (None, {}) for name in ("logit_bias", "metadata")},
    **{name: (None, []) for name in ("tools", "functions")},
    **{name: (None, "none", "auto") for name in ("tool_choice", "function_call")},
    **dict.fromkeys(("audio", "prediction", "moderation", "web_search_options"), (None,)),
    **dict.fromkeys(("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "verbosity"), (None,)),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
}
_TOOLS = ("tools", "functions", "tool_choice", "tool_calls", "tool_call_id", "function_call")


def parse_chat(body: Mapping[str, Any], facts: ModelFacts) -> CompletionCall:
    """Returns the engine's requests that a body asks for.

    Raises:
        ApiError: a field is unknown or unsupported, or has a value that is not allowed; the model has no chat template, or its
            template refuses the messages; or they do not fit.
    """
    if facts.tokenizer.chat.template is None:
        said = f"The model {facts.name!r} has no chat template: it is a base model. Ask /v1/completions to continue a text."
        raise ApiError(400, said, param="model", code="no_chat_template")
    _refuse_tools(body)
    check_fields(body, FIELDS, UNSUPPORTED)
    stream, include_usage, options = flag(body, "stream"), wants_usage(body), sampling_options(body)
    n, shows, top = num_choices(body, 1, facts), flag(body, "logprobs"), num_logprobs(body, "top_logprobs")
    if top is not None and not shows:
        raise bad_value("top_logprobs", top, 'needs "logprobs": true')
    try:
        ids = chat_prompt(facts.tokenizer, _messages(body))
    except ConfigError as error:
        raise api_error(error) from error
    name, older = "max_completion_tokens", body.get("max_tokens")
    if body.get(name) is None:
        name = "max_tokens"
    elif older not in (None, body[name]):
        raise bad_value("max_tokens", older, f"is another name of {name}, which is {body[name]}: give one of them")
    room = max(facts.cache_tokens - len(ids) + 1, 1)
    most = max_new_tokens(name, body.get(name), len(ids), facts, least=1, default=room, prompt="messages")
    requests = [
        Request(
            ids,
            SamplingOptions(**{**options, "seed": (options["seed"] + choice) % 2**64, "max_new_tokens": most}),
            (top or 0) if shows else None,
        )
        for choice in range(n)
    ]
    return CompletionCall(tuple(requests), ("",) * n, len(ids), stream, include_usage, shows, adds_tokens=True)


def _refuse_tools(holder: Mapping[str, Any]) -> None:
    for name in _TOOLS:
        if holder.get(name) not in (None, [], "none", "auto"):
            said = f"{name} is not supported: models here call no tools. Leave it out."
            raise ApiError(400, said, param=name, code="unsupported_field")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages with plain texts; what else they may hold is checked by `chat_prompt`."""
    given = body.get("messages")
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise bad_value("messages", given, 'must be a list such as [{"role": "user", "content": "Hello"}]')
    messages = []
    for message in given:
        _refuse_tools(message)
        said = {name: value for name, value in message.items() if value is not None and name not in _TOOLS}
        said["content"] = _text(said.get("content"))
        # The newer name of the same role, which templates do not know.
        said["role"] = "system" if said.get("role") == "developer" else said.get("role")
        messages.append(said)
    return messages


def _text(content: Any) -> str:
    """Returns a message's text, or that of its parts, a line each."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise bad_value("messages", content, "a content must be a text, or a list of parts of the type text")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_value(
                "messages", part.get("type"), "parts must be of the type text: models here read nothing else"
            )
    return "\n".join(part["text"] for part in parts)
