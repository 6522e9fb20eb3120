"""Our own class, which computes every option of our model; its code travels with the weights (`remote_code`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_samoe.config.derived import written_layer_freq
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.sharing_map import ExpertSource, ways_of, written_options
from megatron_samoe.convert.edited_model import EXPERT_WEIGHTS, moe_layers, one_number
from megatron_samoe.convert.hf.families.base import HEADS, RARE, SIZES, Family, Option, constant, same
from megatron_samoe.convert.hf.families.deepseek import latent_attention
from megatron_samoe.convert.hf.families.entries import OWN_CLASS, Entries, needed, one_of, rare, wrong_entry
from megatron_samoe.convert.hf.families.experts import written_balance
from megatron_samoe.convert.hf.families.llama import ATTENTION, gated, plain
from megatron_samoe.convert.hf.parts import Part, Row, View, at, module, rows, whole
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError

#: Files of the class, and what transformers finds in them.
CODE_FILES = ("configuration_samoe.py", "modeling_samoe.py", "attention_samoe.py", "moe_samoe.py")
AUTO_MAP = {
    "AutoConfig": "configuration_samoe.SamoeConfig",
    "AutoModel": "modeling_samoe.SamoeModel",
    "AutoModelForCausalLM": "modeling_samoe.SamoeForCausalLM",
}
#: Options of the model that have our names, are written where they are not at their default, and may be missing.
_RARE_MODEL_ENTRIES: list[str] = OWN_CLASS["model"]
#: The same of experts, and entries that all of them have, or banks: theirs and ours.
_RARE_ENTRIES: dict[str, str] = OWN_CLASS["rare experts"]
_MOE_ENTRIES: dict[str, str] = OWN_CLASS["experts"]
_POOL_ENTRIES: dict[str, str] = OWN_CLASS["banks"]
#: Names of activations, theirs and ours: whether it is gated, and whether GELU is exact.
_ACTIVATIONS = {"swiglu": (True, False), "gelu_tanh": (False, False), "gelu": (False, True)}
_OF_MOE = ("num_experts", "moe_layers", "moe_intermediate_size", "router_pre_softmax")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_NUMBERS = ("rotary_base", "rotary_percent", "norm_epsilon", "initializer_range", "attention_dropout", "hidden_dropout")
_OTHERS = ("expert_sharing", "lent_experts", "router_aux_loss_coef")
#: Those that may be missing have the type of our option, which refuses others.
_ENTRIES = Entries(
    {
        **dict.fromkeys((*_SIZES, *_HEADS), needed(int)),
        **dict.fromkeys(_NUMBERS, needed(float)),
        **dict.fromkeys(("position_embedding_type", "normalization"), needed(str)),
        **dict.fromkeys(("qk_layernorm", "linear_bias", "qkv_bias", "tie_word_embeddings"), needed(bool)),
        "hidden_act": one_of(*_ACTIVATIONS),
        "expert_layout": one_of("dense", "moe", "samoe"),
        "attention_output_bias": rare(bool),
        **dict.fromkeys(
            (*_RARE_MODEL_ENTRIES, *_MOE_ENTRIES, *_RARE_ENTRIES, *_POOL_ENTRIES, *_OF_MOE, *_OTHERS),
            rare(object, takes_null=True),
        ),
    }
)


def _written_activation(native: NativeModel) -> dict[str, Any]:
    activation = (native.model.swiglu, native.model.exact_gelu)
    return {"hidden_act": next(name for name, which in _ACTIVATIONS.items() if which == activation)}


def _read_activation(config: Mapping[str, Any]) -> dict[str, Any]:
    swiglu, exact_gelu = _ACTIVATIONS[config["hidden_act"]]
    return {"swiglu": swiglu, "exact_gelu": exact_gelu}


def _written_biases(native: NativeModel) -> dict[str, Any]:
    of_output = native.model.attention_output_bias
    other = {} if of_output == native.has_bias else {"attention_output_bias": of_output}
    return {"linear_bias": native.has_bias, "qkv_bias": native.model.qkv_bias, **other}


def _read_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    of_output = config.get("attention_output_bias", config["linear_bias"])
    return {
        "disable_bias_linear": not config["linear_bias"],
        "attention_bias": None if of_output == config["linear_bias"] else of_output,
        "add_qkv_bias": config["qkv_bias"] and not of_output,
    }


def _written_rare(native: NativeModel) -> dict[str, Any]:
    """Returns entries of few models; with latent attention, heads are as wide as its queries."""
    model = native.model
    heads = {"head_dim": model.query_dim, "num_key_value_heads": model.num_attention_heads}
    values = {name: getattr(model, name) for name in _RARE_MODEL_ENTRIES}
    written = {name: value for name, value in values.items() if value != getattr(ModelConfig, name)}
    return {**written, **(heads if model.multi_latent_attention else {})}


def _read_rare(config: Mapping[str, Any]) -> dict[str, Any]:
    read = {name: config[name] for name in _RARE_MODEL_ENTRIES if config.get(name) is not None}
    return {**read, **({"kv_channels": None} if read.get("multi_latent_attention") else {})}


def _written_experts(native: NativeModel) -> dict[str, Any]:
    moe, changes, sources = native.moe, _candidates_change(native), native.sources
    if not sources:
        return {"expert_layout": "dense"}
    options, counts = written_options(sources), _counts(native)
    rare = {theirs: getattr(moe, ours) for theirs, ours in _RARE_ENTRIES.items()}
    without_effect = () if changes else ("num_neighbour_layers",)
    config = {
        "expert_layout": options["expert_layout"],
        **{theirs: getattr(moe, ours) for theirs, ours in _entries_of(moe.has_pool).items()},
        "num_experts": list(counts) if isinstance(counts, tuple) else counts,
        "moe_layers": list(native.is_moe),
        "moe_intermediate_size": native.expert_size,
        "router_pre_softmax": moe.pre_softmax,
        **written_balance(native),
        **{
            name: v
            for name, v in rare.items()
            if v != getattr(MoEConfig, _RARE_ENTRIES[name]) and name not in without_effect
        },
    }
    if options.get("expert_sharing") is not None:
        config["expert_sharing"] = moe.sharing if changes else options["expert_sharing"]
    if any(source.way.make is not None for source in sources):
        config["lent_experts"] = [_lent(source, moe) for source in sources]
    return config


def _entries_of(has_pool: bool) -> dict[str, str]:
    """Returns the entries of experts that have an effect."""
    return _MOE_ENTRIES | (_POOL_ENTRIES if has_pool else {})


def _lent(source: ExpertSource, moe: MoEConfig) -> list[Any]:
    """Returns a layer's `ExpertSource` of our class, without the number of experts."""
    if not source.way.is_shared:
        return [None, 1, None]
    if source.way.combines:
        return [_pool_name(source), moe.num_expert_banks, moe.samoe_normalization]
    return [_pool_name(source), 1, "none" if source.way.mixes else None]


def _pool_name(source: ExpertSource) -> str:
    """Returns what our class calls the experts that layers share, within its pool."""
    if source.way.in_sets:
        return f"sets.{source.number}"
    return "bank" if source.way.make is None else source.way.name


def _read_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    expert_layout = config["expert_layout"]
    if expert_layout == "dense":
        return {"expert_layout": expert_layout}
    sharing = config.get("expert_sharing") if expert_layout == "moe" else None
    combines = any(way.combines for way in ways_of(str(sharing))) if sharing else expert_layout == "samoe"
    entries = _entries_of(combines)
    missing = [name for name in (*entries, *_OF_MOE) if name not in config]
    if missing:
        raise ConfigError("config.json", missing[:3], "these entries of a samoe model are missing")
    pattern = config["moe_layers"]
    if not isinstance(pattern, list) or not all(type(is_moe) is bool or is_moe in (0, 1) for is_moe in pattern):
        raise wrong_entry("moe_layers", pattern, "must be a list that says of each layer whether it has experts")
    options = {
        "expert_layout": expert_layout,
        **{ours: config[theirs] for theirs, ours in entries.items()},
        "moe_layer_freq": written_layer_freq(pattern),
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "num_experts": config["num_experts"],
        "expert_sharing": sharing,
        **{ours: config[theirs] for theirs, ours in _RARE_ENTRIES.items() if theirs in config},
    }
    if options["moe_router_score_function"] in ("softmax", "sigmoid"):
        options["moe_router_pre_softmax"] = config["router_pre_softmax"]
    if config.get("router_aux_loss_coef") is not None:  # earlier exports lack it
        options["moe_aux_loss_coeff"] = config["router_aux_loss_coef"]
    if type(lock := options.get("pool_lock_step")) is int:  # a run that it ends in
        options["train_iters"] = lock + MoEConfig.pool_lock_anneal_steps
    return options


def _counts(native: NativeModel) -> int | tuple[int, ...]:
    """Returns num_experts as it is written: one number, or one for each layer."""
    # Where candidates change, only the short form of the map says how; else a map says all.
    if _candidates_change(native):
        return native.moe.num_experts
    return one_number([place.num_experts for place in moe_layers(native.config)])


def _candidates_change(native: NativeModel) -> bool:
    return native.moe.pool_lock_step is not None or native.moe.neighbour_unmask_steps > 0


def _experts_name(native: NativeModel) -> str:
    """Returns what the class calls packed experts (`experts_name` in its code)."""
    counts, places = _counts(native), moe_layers(native.config)
    is_plain = native.model.swiglu and not native.has_bias
    return "experts" if is_plain and all(place.num_experts == counts for place in places) else "unlike_experts"


def _tensors(native: NativeModel) -> tuple[Any, ...]:
    theirs, ours = "model.layers.{layer}", "layers.{layer}"
    mlp = gated if native.model.swiglu else plain
    return (
        Row("model.embed_tokens.weight", "embedding.word.weight"),
        Row("model.embed_positions.weight", "embedding.position"),
        *module(f"{theirs}.input_layernorm", f"{ours}.attention_norm"),
        *(latent_attention(native, has_pairs=False) if native.model.multi_latent_attention else ATTENTION),
        *module(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm"),
        *mlp(f"{theirs}.mlp", f"{ours}.mlp"),
        _moe,
        *mlp(f"{theirs}.mlp.shared_expert", f"{ours}.moe.shared_expert"),
        *module("model.norm", "final_norm"),
        *_pool(native),
        Row("lm_head.weight", "output.weight"),
    )


def _pool(native: NativeModel) -> Iterator[Part]:
    for source in dict.fromkeys(source for source in native.sources if source.way.is_shared):
        theirs, ours = f"model.expert_pool.{_pool_name(source)}", source.stored(0).removesuffix(".")
        for kind in (kind for kind in EXPERT_WEIGHTS if f"{ours}.{kind}" in native.tensors):
            if source.way.in_sets:
                yield _packed(native, f"{theirs}.{_experts_name(native)}", ours, kind, at(0))
            else:
                part = _packed(native, theirs, ours, kind, whole)
                # Banks one after the other: adapters know three dims, and not four.
                yield replace(part, shape=(part.shape[0] * part.shape[1], *part.shape[2:]), older_shape=part.shape)


def _moe(native: NativeModel, layer: int) -> Iterator[Part]:
    """Yields an MoE layer's parts except the shared expert: experts packed, all else under our names."""
    theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.moe"
    for name, stored in native.tensors.items():
        below_it = name.removeprefix(f"{ours}.")
        if below_it == name or below_it.startswith("shared_expert."):
            continue
        if below_it.startswith("experts."):
            packed = f"{theirs}.{_experts_name(native)}"
            yield _packed(native, packed, f"{ours}.experts", below_it.partition(".")[2], whole)
        else:
            yield Part(f"{theirs}.{below_it}", name, whole, stored.shape)


def _packed(native: NativeModel, theirs: str, ours: str, kind: str, view: View) -> Part:
    """Returns experts packed as transformers packs them: gates and then up projections are rows of one matrix."""
    name = {"1": "gate_up_proj" if native.model.swiglu else "up_proj", "2": "down_proj"}[kind[1]]
    shape = native.tensors[f"{ours}.{kind}"].shape
    shape = shape if view is whole else shape[1:]
    if kind[1] == "1" and native.model.swiglu:
        at_gates = -3 if kind[0] == "w" else -2
        shape = (*shape[:at_gates], 2 * shape[at_gates + 1], *(shape[-1:] if kind[0] == "w" else ()))
    return Part(f"{theirs}.{name}{'_bias' if kind[0] == 'b' else ''}", f"{ours}.{kind}", view, shape)


def _older_parts(native: NativeModel) -> Iterator[Part]:
    """The names of version 0.1, which were ours."""
    for name, stored in native.tensors.items():
        theirs = "lm_head.weight" if name == "output.weight" else f"model.{name}"
        if name in ("embedding.word.weight", "output.weight"):
            yield Part(theirs, name, rows(native.vocab_size), (native.vocab_size, stored.shape[1]))
        else:
            yield Part(theirs, name, whole, stored.shape)


SAMOE = Family(
    "samoe",
    "SamoeForCausalLM",
    "our own class, whatever layers share",
    tensors=_tensors,
    entries=_ENTRIES,
    options=(
        constant(auto_map=AUTO_MAP),
        *SIZES,
        *HEADS,
        same("position_embedding_type"),
        same("rotary_base", kind=float),
        same("rotary_percent", kind=float),
        same("normalization"),
        same("norm_epsilon", kind=float),
        same("qk_layernorm"),
        same("hidden_dropout", kind=float),
        Option(_written_activation, _read_activation),
        Option(_written_biases, _read_biases),
        Option(_written_rare, _read_rare),
        Option(_written_experts, _read_experts),
    ),
    ignored=(),
    knows=RARE,
    older_parts=_older_parts,
)
