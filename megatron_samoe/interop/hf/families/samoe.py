"""Our own class, which computes every option of our model; its code travels with the weights (`remote_code`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_samoe.errors import ConfigError
from megatron_samoe.interop.hf.families.base import Family
from megatron_samoe.interop.hf.families.reading import common
from megatron_samoe.interop.hf.native import NativeModel
from megatron_samoe.interop.hf.parts import Part, rows, whole

#: Files of the class, and what transformers finds in them.
CODE_FILES = ("configuration_samoe.py", "modeling_samoe.py")
AUTO_MAP = {
    "AutoConfig": "configuration_samoe.SamoeConfig",
    "AutoModelForCausalLM": "modeling_samoe.SamoeForCausalLM",
}
#: Entries of config.json that carry over as they are: theirs, ours, and ours' group.
_MODEL_ENTRIES = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads",
    "position_embedding_type": "position_embedding_type", "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent", "normalization": "normalization", "norm_epsilon": "norm_epsilon",
    "qk_layernorm": "qk_layernorm", "initializer_range": "init_method_std", "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
}  # fmt: skip
_MOE_ENTRIES = {
    "expert_layout": "expert_layout", "num_experts": "num_experts", "num_experts_per_tok": "moe_router_topk",
    "router_score_function": "moe_router_score_function",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size", "num_expert_banks": "num_expert_banks",
    "samoe_granularity": "samoe_granularity", "samoe_normalization": "samoe_normalization",
}  # fmt: skip


def _write(native: NativeModel) -> dict[str, Any]:
    model, moe = native.model, native.moe
    return {
        "auto_map": AUTO_MAP, "vocab_size": native.vocab_size,
        **{theirs: getattr(model, ours) for theirs, ours in _MODEL_ENTRIES.items()},
        "head_dim": model.head_dim, "num_key_value_heads": model.num_kv_heads, "intermediate_size": model.mlp_size,
        "max_position_embeddings": model.max_positions, "hidden_act": "swiglu" if model.swiglu else "gelu_tanh",
        "linear_bias": native.has_bias, "qkv_bias": model.qkv_bias,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        **{theirs: getattr(moe, ours) for theirs, ours in _MOE_ENTRIES.items()},
        "moe_layers": list(native.is_moe), "moe_intermediate_size": native.expert_size,
        "router_pre_softmax": moe.pre_softmax,
    }  # fmt: skip


def _read(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    common(config)
    computed = ("head_dim", "num_key_value_heads", "intermediate_size", "max_position_embeddings", "hidden_act",
                "linear_bias", "qkv_bias", "tie_word_embeddings", "moe_layers", "moe_intermediate_size",
                "router_pre_softmax")  # fmt: skip
    missing = [key for key in (*_MODEL_ENTRIES, *_MOE_ENTRIES, *computed) if key not in config]
    if missing:
        raise ConfigError("config.json", missing[:3], "these entries of a samoe model are missing")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    model = {ours: config[theirs] for theirs, ours in _MODEL_ENTRIES.items()}
    moe = {ours: config[theirs] for theirs, ours in _MOE_ENTRIES.items()}
    model |= {
        "kv_channels": config["head_dim"], "group_query_attention": kv_heads != heads,
        "num_query_groups": kv_heads if kv_heads != heads else 1, "ffn_hidden_size": config["intermediate_size"],
        "seq_length": config["max_position_embeddings"], "swiglu": config["hidden_act"] == "swiglu",
        "disable_bias_linear": not config["linear_bias"],
        "add_qkv_bias": config["qkv_bias"] and not config["linear_bias"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }  # fmt: skip
    if moe["expert_layout"] == "dense":
        return {"model": model, "moe": {"expert_layout": "dense"}}
    pattern = config["moe_layers"]
    moe |= {
        "moe_layer_freq": "1" if all(pattern) else "[" + ",".join("01"[bool(m)] for m in pattern) + "]",
        "moe_ffn_hidden_size": config["moe_intermediate_size"], "moe_router_pre_softmax": config["router_pre_softmax"],
    }  # fmt: skip
    if moe["expert_layout"] != "samoe":
        moe = {k: v for k, v in moe.items() if k != "num_expert_banks" and not k.startswith("samoe_")}
    return {"model": model, "moe": moe}


def _parts(native: NativeModel) -> Iterator[Part]:
    for name, stored in native.tensors.items():
        theirs = "lm_head.weight" if name == "output.weight" else f"model.{name}"
        if name in ("embedding.word.weight", "output.weight"):
            yield Part(theirs, name, rows(native.vocab_size), (native.vocab_size, stored.shape[1]))
        else:
            yield Part(theirs, name, whole, stored.shape)


SAMOE = Family(
    "samoe", "SamoeForCausalLM", "our own class, with the pool of experts or without", (), _write, _parts, _read
)
