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
from megatron_samoe.convert.hf.families.base import HEADS, RARE, SIZES, Family, Option, read_heads, written_entries
from megatron_samoe.convert.hf.families.deepseek import latent_attention
from megatron_samoe.convert.hf.families.entries import Entries, one_of, rare
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
#: Entries of config.json that carry over as they are: theirs, ours, and ours' group.
_MODEL_ENTRIES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "qk_layernorm": "qk_layernorm",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
}
_MOE_ENTRIES = {
    "num_experts_per_tok": "moe_router_topk",
    "router_score_function": "moe_router_score_function",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
}
#: Options of the model that have our names, are written where they are not at their default, and may be missing.
_RARE_MODEL_ENTRIES = (
    "qk_layernorm_scope",
    "clip_qkv",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "use_parallel_residual",
    "sliding_window",
    "window_attn_skip_freq",
    "rope_scaling_type",
    "rope_scaling_factor",
    "rope_original_max_positions",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_attention_factor",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
)
#: The same of experts: theirs and ours.
_RARE_ENTRIES = {
    "router_expert_bias": "moe_router_enable_expert_bias",
    "router_num_groups": "moe_router_num_groups",
    "router_group_topk": "moe_router_group_topk",
    "router_scaling_factor": "moe_router_topk_scaling_factor",
    "shared_expert_gate": "moe_shared_expert_gate",
    "residual_mlp": "moe_residual_mlp",
    "num_neighbour_layers": "num_neighbour_layers",
    "neighbour_unmask_steps": "neighbour_unmask_steps",
    "pool_lock_step": "pool_lock_step",
}
_POOL_ENTRIES = {name: name for name in ("num_expert_banks", "samoe_granularity", "samoe_normalization")}
#: Entries of theirs that are computed from ours.
_COMPUTED = (
    "head_dim",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "linear_bias",
    "qkv_bias",
    "tie_word_embeddings",
    "expert_layout",
)
#: Names of activations, theirs and ours: whether it is gated, and whether GELU is exact.
_ACTIVATIONS = {"swiglu": (True, False), "gelu_tanh": (False, False), "gelu": (False, True)}
_COMPUTED_OF_MOE = ("num_experts", "moe_layers", "moe_intermediate_size", "router_pre_softmax")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
#: Each has the type of our option, which refuses others.
_ENTRIES = Entries(
    {
        **dict.fromkeys(
            (
                *_MODEL_ENTRIES,
                *_RARE_MODEL_ENTRIES,
                *_MOE_ENTRIES,
                *_RARE_ENTRIES,
                *_POOL_ENTRIES,
                *_COMPUTED,
                *_COMPUTED_OF_MOE,
                "expert_sharing",
                "lent_experts",
                "router_aux_loss_coef",
            ),
            rare(object, takes_null=True),
        ),
        **dict.fromkeys(_SIZES, rare(int)),
        **dict.fromkeys(("linear_bias", "qkv_bias", "tie_word_embeddings", "attention_output_bias"), rare(bool)),
        "hidden_act": one_of(*_ACTIVATIONS),
        "expert_layout": one_of("dense", "moe", "samoe"),
    }
)


def _moe_entries(layout: str, has_pool: bool) -> dict[str, str]:
    """Returns the entries that count for a layout; what does not count is not written."""
    return (_MOE_ENTRIES if layout != "dense" else {}) | (_POOL_ENTRIES if has_pool else {})


def _model_entries(model: ModelConfig) -> dict[str, Any]:
    """Returns the transformer's entries but those that other classes have as well."""
    rare = {name: getattr(model, name) for name in _RARE_MODEL_ENTRIES}
    written = {name: value for name, value in rare.items() if value != getattr(ModelConfig, name)}
    if model.attention_output_bias != (not model.disable_bias_linear):
        written["attention_output_bias"] = model.attention_output_bias
    activation = (model.swiglu, model.exact_gelu)
    return {
        **{theirs: getattr(model, ours) for theirs, ours in _MODEL_ENTRIES.items()},
        **written,
        "hidden_act": next(name for name, which in _ACTIVATIONS.items() if which == activation),
        "linear_bias": not model.disable_bias_linear,
        "qkv_bias": model.qkv_bias,
    }


def _write(native: NativeModel) -> dict[str, Any]:
    model, moe = native.model, native.moe
    written = written_options(native.sources) if native.sources else {"expert_layout": "dense"}
    layout, sharing = str(written["expert_layout"]), written.get("expert_sharing")
    config = {
        "auto_map": AUTO_MAP,
        **written_entries((*SIZES, *HEADS), native),
        **_model_entries(model),
        "expert_layout": layout,
        **{theirs: getattr(moe, ours) for theirs, ours in _moe_entries(layout, moe.has_pool).items()},
    }
    if model.multi_latent_attention:
        config |= {"head_dim": model.query_dim, "num_key_value_heads": model.num_attention_heads}
    if layout != "dense":
        changes, counts = _candidates_change(native), _counts(native)
        experts = list(counts) if isinstance(counts, tuple) else counts
        config |= {
            "num_experts": experts,
            "moe_layers": list(native.is_moe),
            "moe_intermediate_size": native.expert_size,
            "router_pre_softmax": moe.pre_softmax,
            **written_balance(native),
        }
        given = {theirs: (getattr(moe, ours), getattr(MoEConfig(), ours)) for theirs, ours in _RARE_ENTRIES.items()}
        given |= {} if changes else {"num_neighbour_layers": (None, None)}
        config |= {theirs: value for theirs, (value, default) in given.items() if value != default}
        if sharing is not None:
            config["expert_sharing"] = moe.sharing if changes else sharing
        if any(source.way.make is not None for source in native.sources):
            config["lent_experts"] = [_lent(source, moe) for source in native.sources]
    return config


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


def _read(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    layout = config.get("expert_layout", "dense")
    of_moe = _COMPUTED_OF_MOE if layout != "dense" else ()
    sharing = config.get("expert_sharing") if layout == "moe" else None
    combines = any(way.combines for way in ways_of(str(sharing))) if sharing else layout == "samoe"
    of_layout = _moe_entries(layout, combines)
    missing = [key for key in (*_MODEL_ENTRIES, *_COMPUTED, *of_layout, *of_moe) if key not in config]
    if missing:
        raise ConfigError("config.json", missing[:3], "these entries of a samoe model are missing")
    has_output_bias = config.get("attention_output_bias", config["linear_bias"])
    swiglu, exact_gelu = _ACTIVATIONS[config["hidden_act"]]
    model = {ours: config[theirs] for theirs, ours in _MODEL_ENTRIES.items()}
    model |= {
        "kv_channels": config["head_dim"],
        **read_heads(config),
        "ffn_hidden_size": config["intermediate_size"],
        "seq_length": config["max_position_embeddings"],
        "swiglu": swiglu,
        "exact_gelu": exact_gelu,
        "disable_bias_linear": not config["linear_bias"],
        "attention_bias": None if has_output_bias == config["linear_bias"] else has_output_bias,
        "add_qkv_bias": config["qkv_bias"] and not has_output_bias,
        **{name: config[name] for name in _RARE_MODEL_ENTRIES if config.get(name) is not None},
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }
    if model.get("multi_latent_attention"):
        model["kv_channels"] = None
    moe = {"expert_layout": layout, **{ours: config[theirs] for theirs, ours in of_layout.items()}}
    if layout != "dense":
        pattern = config["moe_layers"]
        if not isinstance(pattern, list) or not all(type(is_moe) is bool or is_moe in (0, 1) for is_moe in pattern):
            raise ConfigError(
                "config.json: moe_layers", pattern, "must be a list that says of each layer whether it has experts"
            )
        moe |= {
            "moe_layer_freq": written_layer_freq(pattern),
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "num_experts": config["num_experts"],
            "expert_sharing": sharing,
            **{ours: config[theirs] for theirs, ours in _RARE_ENTRIES.items() if theirs in config},
        }
        if moe["moe_router_score_function"] in ("softmax", "sigmoid"):
            moe["moe_router_pre_softmax"] = config["router_pre_softmax"]
        if config.get("router_aux_loss_coef") is not None:  # earlier exports lack it
            moe["moe_aux_loss_coeff"] = config["router_aux_loss_coef"]
    read = {"model": model, "moe": moe}
    if type(lock := moe.get("pool_lock_step")) is int:  # a run that it ends in
        read["training"] = {"train_iters": lock + MoEConfig().pool_lock_anneal_steps}
    return read


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
    options=(Option(_write, _read),),
    ignored=(),
    knows=RARE,
    older_parts=_older_parts,
)
