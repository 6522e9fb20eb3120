"""What a family of Hugging Face classes is, and the rules that say whether a native model fits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_samoe.config.derived import flag
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families.entries import Entries
from megatron_samoe.convert.hf.parts import Parts
from megatron_samoe.convert.native import NativeModel

#: Returns why a native model is none of the family, or None.
Rule = Callable[[NativeModel], str | None]


@dataclass(frozen=True)
class Family:
    """A class of models, as transformers knows it.

    Attributes:
        name: its model_type, which is also the name for --hf-model-type.
        architecture: the class for causal language modelling.
        summary: what it computes, in a few words.
        rules: all must hold for a native model to be exported to it.
        write_config: config.json's entries for a native model that fits.
        parts: its tensors.
        entries: what its config.json holds.
        read_config: native options, by group, of completed entries; ConfigError where we cannot compute it.
        ignored: endings of tensors that files may hold besides, without effect on the result.
        knows: those of the options that few classes have (RARE) which it computes; others must be at their defaults.
        older_parts: its tensors as earlier versions named them, to be read.
    """

    name: str
    architecture: str
    summary: str
    rules: tuple[Rule, ...]
    write_config: Callable[[NativeModel], dict[str, Any]]
    parts: Callable[[NativeModel], Parts]
    entries: Entries
    read_config: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]
    ignored: tuple[str, ...] = ()
    knows: tuple[str, ...] = ()
    older_parts: Callable[[NativeModel], Parts] | None = None

    def misfits(self, native: NativeModel) -> list[str]:
        """Returns why a native model is none of this family; empty where it fits."""
        rare = [needs(option, getattr(ModelConfig, option)) for option in RARE if option not in self.knows]
        return [reason for rule in (*self.rules, *rare) if (reason := rule(native)) is not None]


#: Options of the model that few classes have.
RARE = (
    "attention_bias", "clip_qkv", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "use_parallel_residual", "exact_gelu", "multi_latent_attention",
)  # fmt: skip

#: Entries of config.json that are sizes and numbers of ours, which most classes call alike.
ENTRIES = {
    "hidden_size": "hidden_size", "intermediate_size": "mlp_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
    "max_position_embeddings": "max_positions", "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
}  # fmt: skip


def entries(native: NativeModel) -> dict[str, Any]:
    """Returns the entries that most classes share."""
    return {
        "vocab_size": native.vocab_size, **{theirs: getattr(native.model, ours) for theirs, ours in ENTRIES.items()},
        "tie_word_embeddings": not native.model.untie_embeddings_and_output_weights,
    }  # fmt: skip


def needs(option: str, *allowed: object) -> Rule:
    """Returns the rule that an option of the model or its experts has one of the allowed values."""

    def rule(native: NativeModel) -> str | None:
        group = native.model if hasattr(native.model, option) else native.moe
        value = getattr(group, option)
        return None if value in allowed else f"{_shown(option, value)} (it needs {_options(option, allowed)})"

    return rule


def _shown(option: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(option) if value else f"no {flag(option)}"
    return f"no {flag(option)}" if value is None else f"{flag(option)} {value}"


def _options(option: str, allowed: tuple[object, ...]) -> str:
    return " or ".join(_shown(option, value) for value in allowed)


def plain_heads(native: NativeModel) -> str | None:
    """The heads' sizes add up to the hidden size, and there is no other way to say it."""
    model = native.model
    if model.head_dim * model.num_attention_heads == model.hidden_size:
        return None
    return f"--kv-channels {model.head_dim} (it needs hidden size / heads)"


def whole_heads(native: NativeModel) -> str | None:
    """The number of heads divides the hidden size."""
    model = native.model
    if model.hidden_size % model.num_attention_heads == 0:
        return None
    return f"--num-attention-heads {model.num_attention_heads} (it must divide --hidden-size {model.hidden_size})"


def all_layers_are_moe(native: NativeModel) -> str | None:
    """Every layer has experts."""
    return None if all(native.is_moe) else f"--moe-layer-freq {native.moe.moe_layer_freq} (all of its layers are MoE)"


def one_number_of_experts(native: NativeModel) -> str | None:
    """All layers have the same number of experts."""
    counts = native.moe.expert_counts
    return None if len(set(counts)) == 1 else f"--num-experts {' '.join(map(str, counts))} (it needs one number)"
