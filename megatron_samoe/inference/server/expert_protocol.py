"""`/v1/experts` as plain values, an addition to OpenAI's API: which experts each token of a text uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.inference.expert_use import LayerUse
from megatron_samoe.inference.server.protocol import ApiError, ModelFacts, check_fields, encoded, given_prompts


def parse_text(body: Mapping[str, Any], facts: ModelFacts) -> list[int]:
    """Returns the tokens of the one text of a request for its experts, which has no other field.

    Raises:
        ApiError: a field is unknown, or the text is missing, empty or longer than the context.
    """
    check_fields(body, ("model", "prompt"), {})
    given = given_prompts(body)
    if len(given) != 1:
        raise ApiError(400, f"prompt has {len(given)} texts: one is shown at a time.", param="prompt")
    _, (ids,) = encoded(given, facts)
    if len(ids) > facts.context_length:
        said = f"The text has {len(ids)} tokens; the model's context is {facts.context_length}."
        raise ApiError(400, said, param="prompt", code="context_length_exceeded")
    return ids


def experts_body(ids: Sequence[int], layers: Sequence[LayerUse], tokenizer: Tokenizer) -> dict:
    """Returns the tokens of a text and what they use of each MoE layer."""
    shown = [
        {
            "layer": use.layer,
            "num_experts": use.num_experts,
            "source": use.source,
            "banks": [round(b, 4) for b in use.banks],
            "experts": use.experts_TK,
            "weights": use.weights_TK,
        }
        for use in layers
    ]
    return {"object": "experts", "tokens": [tokenizer.decode([i]) for i in ids], "layers": shown}
