"""Families of Hugging Face classes: tables for both directions, and rules that say whether a native model fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_samoe.config.derived import flag
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families.entries import Entries
from megatron_samoe.convert.hf.families.reading import MULTIPLIERS
from megatron_samoe.convert.hf.parts import Parts, Rows, parts_by
from megatron_samoe.convert.native import NativeModel

#: Returns why a native model does not fit the family, or None.
Rule = Callable[[NativeModel], str | None]


@dataclass(frozen=True)
class Option:
    """A line of a family's table of config.json: what is written of ours, and which options of ours completed entries are."""

    write: Callable[[NativeModel], Mapping[str, Any]]
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]


def same(theirs: str, ours: str | None = None, kind: Callable[[Any], Any] | None = None, written: str = "") -> Option:
    """Returns the line of an entry that is one option: their name | our name | type.

    Args:
        written: property of the model that is written, where the option itself may be left open.
    """
    name = ours or theirs

    def read(config: Mapping[str, Any]) -> Mapping[str, Any]:
        value = config[theirs]
        return {name: value if kind is None or value is None else kind(value)}

    return Option(lambda native: {theirs: _value(native, written or name)}, read)


def constant(**entries: Any) -> Option:
    """Returns the row of entries that have one value, written and read."""
    return Option(lambda native: entries, lambda config: {})


def always(**options: Any) -> Option:
    """Returns the line of options that every model of the class has, which a rule of its own demands."""
    return Option(lambda native: {}, lambda config: options)


def _value(native: NativeModel, name: str) -> Any:
    """Returns a fact of a model, of its transformer or of its experts."""
    return getattr(next(group for group in (native, native.model, native.moe) if hasattr(group, name)), name)


@dataclass(frozen=True)
class Family:
    """A class of models, as transformers knows it: two-way tables, and what it refuses.

    Attributes:
        name: its model_type, which is also the name for --hf-model-type.
        architecture: the class for causal language modelling.
        summary: what it computes, in a few words.
        tensors: their name | our name | view, of each tensor.
        entries: what its config.json holds, with the class's defaults.
        options: entries of config.json | options of ours; where two lines have the same, the later counts.
        fixed: options that every model of the class has; one with another value is refused.
        rules: what else must hold for a native model to be exported to it.
        ignored: endings of tensors that files may hold and that have no effect on the result.
        knows: those of the options that few classes have (RARE) which it computes; others must be at their defaults.
        older_parts: its tensors as earlier versions named them, to be read.
    """

    name: str
    architecture: str
    summary: str
    tensors: Rows | Callable[[NativeModel], Rows]
    entries: Entries
    options: tuple[Option, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    knows: tuple[str, ...] = ()
    older_parts: Callable[[NativeModel], Parts] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.entries, Entries):  # of a package for version 0.1, whose families were functions
            raise TypeError(
                f"Family {self.name} is not made of tables: its tensors, entries and options (docs/extending.md)"
            )

    def parts(self, native: NativeModel) -> Parts:
        """Yields the tensors of a model in the order of its layers."""
        return parts_by(self.tensors(native) if callable(self.tensors) else self.tensors, native)

    def write_config(self, native: NativeModel) -> dict[str, Any]:
        """Returns config.json's entries for a native model that fits."""
        return {name: value for option in self.options for name, value in option.write(native).items()}

    def read_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns native options of completed entries; ConfigError where we cannot compute them."""
        read = {name: value for option in self.options for name, value in option.read(config).items()}
        return {**self.fixed, **read}

    def misfits(self, native: NativeModel) -> list[str]:
        """Returns why a native model does not fit this family; empty where it does."""
        fixed = [needs(option, value) for option, value in self.fixed.items()]
        rare = [needs(option, getattr(ModelConfig, option)) for option in RARE if option not in self.knows]
        return [reason for rule in (*fixed, *self.rules, *rare) if (reason := rule(native)) is not None]


#: Options of the model that few classes have.
RARE = ("attention_bias", "clip_qkv", *MULTIPLIERS, "use_parallel_residual", "exact_gelu", "multi_latent_attention")


def _read_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return {"group_query_attention": kv_heads != heads, "num_query_groups": kv_heads if kv_heads != heads else 1}


#: The vocabulary, which is not an option of ours, and whether the output matrix is the embedding.
WORDS = (
    Option(lambda native: {"vocab_size": native.vocab_size}, lambda config: {}),
    Option(
        lambda native: {"tie_word_embeddings": not native.model.untie_embeddings_and_output_weights},
        lambda config: {"untie_embeddings_and_output_weights": not config["tie_word_embeddings"]},
    ),
)
#: Entries that have the same name in most classes.
SIZES = (
    *WORDS,
    same("hidden_size"),
    same("intermediate_size", "ffn_hidden_size", written="mlp_size"),
    same("num_hidden_layers", "num_layers"),
    same("num_attention_heads"),
    same("max_position_embeddings", "seq_length", written="max_positions"),
    same("initializer_range", "init_method_std", float),
    same("attention_dropout", kind=float),
)
#: Heads of keys and values, and their size.
HEADS = (
    Option(lambda native: {"num_key_value_heads": native.model.num_kv_heads}, _read_heads),
    Option(
        lambda native: {"head_dim": native.model.head_dim},
        lambda config: {"kv_channels": config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])},
    ),
)


def needs(option: str, *allowed: object) -> Rule:
    """Returns the rule that an option of the model or its experts has one of the allowed values."""

    def rule(native: NativeModel) -> str | None:
        group = native.model if hasattr(native.model, option) else native.moe
        value = getattr(group, option)
        legal = " or ".join(_shown(option, one) for one in allowed)
        return None if value in allowed else f"{_shown(option, value)} (it needs {legal})"

    return rule


def _shown(option: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(option) if value else f"no {flag(option)}"
    return f"no {flag(option)}" if value is None else f"{flag(option)} {value}"


def plain_heads(native: NativeModel) -> str | None:
    """The heads' sizes add up to the hidden size, and no entry could say otherwise."""
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
