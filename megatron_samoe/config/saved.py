"""The upgrade of configurations that earlier versions saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_samoe.config.model import ModelConfig

#: An option that every configuration saved since 0.2 has.
_SINCE_0_2 = "moe_scale_output_init"


def upgrade(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a complete saved configuration as this version reads it: what earlier versions derived by other rules is
    given explicitly.

    Before 0.2 an expert was as wide as the dense MLP unless its width was given, also for top-k above 1.
    """
    model, moe = saved.get("model"), saved.get("moe")
    if not isinstance(model, Mapping) or not isinstance(moe, Mapping) or _SINCE_0_2 in moe:
        return saved
    if moe.get("moe_ffn_hidden_size", 0) is not None or moe.get("moe_router_topk") in (None, 1):
        return saved
    known = {f.name: model[f.name] for f in fields(ModelConfig) if f.name in model}
    try:
        width = ModelConfig(**known).mlp_size
    except TypeError:  # damaged: whoever converts the values names the one that is wrong
        return saved
    return {**saved, "moe": {**moe, "moe_ffn_hidden_size": width}}
