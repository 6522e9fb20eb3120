"""The parts of vLLM that the plug-in needs, checked before use."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

from megatron_samoe.errors import MegatronSamoeError

#: The version that the plug-in was tried with.
TRIED = "0.32.0"
_MODELS = "vllm.model_executor.models.transformers"
#: For each name its module, and keywords or methods that it must have.
_NEEDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "TransformersForCausalLM": (_MODELS, ("recursive_replace", "load_weights")),
    "TransformersMoERunner": (f"{_MODELS}.moe", ("forward",)),
    "TransformersMoEState": (f"{_MODELS}.moe", ()),
    "TransformersRoutedExperts": (f"{_MODELS}.moe", ("load_weights",)),
    "FusedMoEFactory": (
        "vllm.model_executor.layers.fused_moe",
        (
            "num_experts",
            "top_k",
            "hidden_size",
            "intermediate_size",
            "renormalize",
            "quant_config",
            "prefix",
            "activation",
            "custom_routing_function",
            "runner_cls",
            "runner_args",
            "routed_experts_cls",
        ),
    ),
    "current_platform": ("vllm.platforms", ("is_cpu",)),
}


def vllm_interface() -> SimpleNamespace:
    """Returns vLLM's classes and functions by name.

    Raises:
        MegatronSamoeError: this vLLM lacks one, or one has another form.
    """
    found: dict[str, Any] = {}
    for name, (module, needed) in _NEEDED.items():
        try:
            thing = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise _unknown(f"{module} has no {name} ({error})") from error
        has = set(dir(thing))
        if inspect.isfunction(thing):
            has = set(inspect.signature(thing).parameters)
        if missing := [part for part in needed if part not in has]:
            raise _unknown(f"{module}.{name} has no {missing[0]}")
        found[name] = thing
    return SimpleNamespace(**found)


def _unknown(what: str) -> MegatronSamoeError:
    version = getattr(importlib.import_module("vllm"), "__version__", "of no version")
    return MegatronSamoeError(
        f"megatron_samoe's plug-in does not know the interface of vLLM {version}: {what}. It was tried with {TRIED}. "
        "vLLM's own Transformers back end may serve the folder without it: --model-impl transformers --trust-remote-code."
    )
