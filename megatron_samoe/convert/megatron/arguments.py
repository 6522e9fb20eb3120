"""Megatron-LM's arguments, as its checkpoints keep them, and our configuration: what each says of the other's model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.derived import parse_moe_layer_freq
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import refuse_excess
from megatron_samoe.convert.megatron.latents import read_latents, written_latents
from megatron_samoe.errors import CheckpointError, ConfigError, shown
from megatron_samoe.parsing import finite_float, parse_yaml

TOKENIZERS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer")
_FILE: Mapping[str, Any] = parse_yaml(Path(__file__).with_name("arguments.yaml").read_text())
#: Arguments under which Megatron computes something that our model does not, with the values that are harmless.
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    **dict.fromkeys(_FILE["must be off"], (False, None)),
    **dict.fromkeys(_FILE["must not be given"], (None,)),
    **_FILE["must be one of"],
}
#: Of further arguments that are read, the types.
_OTHERS = {
    **dict.fromkeys(("add_bias_linear", "bf16", "fp16", "bias_gelu_fusion", "openai_gelu"), bool),
    "layernorm_epsilon": float,
    "micro_batch_size": int,
}
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")


def to_arguments(config: PretrainConfig, vocab_size: int, padded: int) -> argparse.Namespace:
    """Returns the arguments with which Megatron-LM builds a model, layout apart, as plain values.

    Args:
        padded: rows of the word embedding.

    Raises:
        ConfigError: Megatron has no such model.
    """
    model, moe = config.model, config.moe
    values: dict[str, Any] = {
        **{name: getattr(model, name) for name in _FILE["model"]},
        **{name: getattr(config.data, name) for name in ("tokenizer_type", *_TOKENIZER_FILES)},
        "ffn_hidden_size": model.mlp_size,
        "kv_channels": model.head_dim,
        "num_query_groups": model.num_kv_heads,
        "encoder_seq_length": model.seq_length,
        "max_position_embeddings": model.max_positions,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": model.position_embedding_type == "rope",
        "rotary_base": int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        "rotary_interleaved": False,
        "apply_layernorm_1p": False,
        "add_bias_linear": not model.disable_bias_linear,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded,
        "bf16": config.training.bf16,
        "fp16": config.training.fp16,
        "data_parallel_random_init": False,
        "num_experts": None,
        "bias_gelu_fusion": True,
    }
    if moe.expert_layout != "dense":
        values |= _moe_arguments(config)
    values |= written_latents(model)
    return argparse.Namespace(**values)


def _moe_arguments(config: PretrainConfig) -> dict[str, Any]:
    moe, model = config.moe, config.model
    if moe.moe_router_score_function == "sigmoid" and moe.pre_softmax and moe.moe_router_topk > 1:
        raise ConfigError(
            "--moe-router-pre-softmax",
            True,
            "cannot be exported with sigmoid scores and top-k above 1: "
            "Megatron always normalises such scores among the chosen",
        )
    if moe.moe_shared_expert_intermediate_size is not None and not model.disable_bias_linear:
        raise ConfigError(
            "--moe-shared-expert-intermediate-size",
            moe.moe_shared_expert_intermediate_size,
            "cannot be exported without --disable-bias-linear: Megatron's shared experts have no bias",
        )
    pattern = [int(is_moe) for is_moe in parse_moe_layer_freq(moe.moe_layer_freq, model.num_layers)]
    # Megatron's aux_loss is over the sequences of a micro-batch.
    group, balancing = moe.balance_group_size, moe.moe_router_load_balancing_type
    by_sequence = {"moe_router_load_balancing_type": "seq_aux_loss"} if balancing == "aux_loss" else {}
    return {
        **{name: getattr(moe, name) for name in _FILE["experts"]},
        **(by_sequence if group == 1 else {"micro_batch_size": group}),
        "moe_layer_freq": pattern,
        "moe_ffn_hidden_size": config.expert_ffn_size,
        "moe_router_pre_softmax": moe.pre_softmax,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff or None,
        "moe_input_jitter_eps": moe.moe_input_jitter_eps or None,
    }


def from_arguments(args: argparse.Namespace, where: str) -> PretrainConfig:
    """Returns the configuration of the model that Megatron-LM's arguments describe.

    Raises:
        CheckpointError: our model cannot compute it, by the argument's name.
    """
    _refuse_wrong_types(args, where)
    _refuse_unsupported(args, where)

    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    for name in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size"):
        if not isinstance(get(name), int) or get(name) < 1:
            raise CheckpointError(f"{where} keeps no argument {name}: without it the model is not known.")
    heads = get("num_attention_heads")
    groups = get("num_query_groups", heads) if get("group_query_attention", False) else heads
    positions = get("position_embedding_type", "learned_absolute")
    default = ModelConfig()
    rotary = ("rotary_base", "rotary_percent") if positions == "rope" else ()
    same = {name: get(name, getattr(default, name)) for name in _FILE["model"] if name not in ("rotary_percent",)}
    same |= {name: float(get(name, getattr(default, name))) for name in rotary}
    model = ModelConfig(
        **same
        | {
            "ffn_hidden_size": get("ffn_hidden_size", 4 * get("hidden_size")),
            "kv_channels": get("kv_channels"),
            "group_query_attention": groups != heads,
            "num_query_groups": groups if groups != heads else 1,
            "max_position_embeddings": get("max_position_embeddings"),
            "position_embedding_type": positions,
            "norm_epsilon": get("norm_epsilon", get("layernorm_epsilon", default.norm_epsilon)),
            "disable_bias_linear": not get("add_bias_linear", True),
            "add_qkv_bias": bool(get("add_qkv_bias", False)) and not get("add_bias_linear", True),
            "attention_dropout": get("attention_dropout", 0.0),
            "hidden_dropout": get("hidden_dropout", 0.0),
        }
    )
    if get("multi_latent_attention", False):
        model = read_latents(model, get, where)
    elif get("rope_type", "rope") != "rope":
        raise CheckpointError(f"{where}: rope_type is {get('rope_type')!r}, which is read with latent attention only.")
    model = _with_derived_sizes(model)
    data = DataConfig(mock_data=True)
    if get("tokenizer_type") in TOKENIZERS:
        files = {name: get(name) for name in _TOKENIZER_FILES}
        data = replace(data, tokenizer_type=get("tokenizer_type"), **files)
    refuse_excess(PretrainConfig(model=model))  # before a list has an entry for each layer
    config = PretrainConfig(model=model, moe=_moe_config(get, model, where), data=data)
    refuse_excess(config)
    return replace(
        config, training=replace(config.training, bf16=bool(get("bf16", False)), fp16=bool(get("fp16", False)))
    )


def _with_derived_sizes(model: ModelConfig) -> ModelConfig:
    """Returns the same model with sizes left out that follow from others, as a user would write it."""
    plain = replace(model, ffn_hidden_size=None)
    if plain.mlp_size == model.mlp_size:
        model = plain
    if model.kv_channels is not None and model.kv_channels * model.num_attention_heads == model.hidden_size:
        model = replace(model, kv_channels=None)
    return replace(model, max_position_embeddings=None) if model.max_positions == model.seq_length else model


def _frequency(value: Any, num_layers: int) -> str:
    """Returns --moe-layer-freq as an integer where one says the same."""
    pattern = [bool(v) for v in value] if isinstance(value, (list, tuple)) else None
    if pattern is None:
        return shown(value) if not isinstance(value, str) else value
    for every in range(1, num_layers + 1):
        if pattern == [i % every == 0 for i in range(num_layers)]:
            return str(every)
    return "".join(str(int(is_moe)) for is_moe in pattern)


def _moe_config(get: Any, model: ModelConfig, where: str) -> MoEConfig:
    if get("num_experts") is None:
        return MoEConfig()
    topk, default = get("moe_router_topk", 2), MoEConfig()
    sigmoid = get("moe_router_score_function", "softmax") == "sigmoid"
    pre_softmax = bool(get("moe_router_pre_softmax", False)) and not (sigmoid and topk > 1)
    balancing = get("moe_router_load_balancing_type", "aux_loss")
    balancing = balancing[0] if isinstance(balancing, list) and len(balancing) == 1 else balancing
    if balancing not in ("aux_loss", "seq_aux_loss", "none"):
        raise CheckpointError(
            f"{where}: moe_router_load_balancing_type is {balancing!r}; this model has aux_loss, seq_aux_loss and none."
        )
    ffn = get("moe_ffn_hidden_size", model.mlp_size)
    coefficient = get("moe_aux_loss_coeff", 0.0) if balancing != "none" else default.moe_aux_loss_coeff
    options = {name: get(name, getattr(default, name)) for name in (*_FILE["experts"], *_FILE["experts, read"])}
    if balancing == "aux_loss" and get("micro_batch_size", 1) != 1:
        options["moe_aux_loss_group_size"] = get("micro_batch_size")
    if not options["moe_expert_capacity_factor"]:
        del options["moe_token_drop_policy"]
    if get("expert_sharing", "none") != "none":
        options |= {name: get(name) for name in _FILE["sharing"] if get(name) is not None}
    config = MoEConfig(
        **options
        | {
            "expert_layout": "moe",
            "moe_layer_freq": _frequency(get("moe_layer_freq", 1), model.num_layers),
            "moe_ffn_hidden_size": None if ffn * topk == model.mlp_size else ffn,
            "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
            "moe_router_pre_softmax": None if pre_softmax == (topk == 1) else pre_softmax,
            "moe_router_load_balancing_type": balancing,
            "moe_aux_loss_coeff": coefficient,
        }
    )
    if config.sharing_reads("num_neighbour_layers"):  # whose experts the plug-in counts by blocks
        return replace(config, num_experts=config.most_experts // config.num_neighbour_layers)
    return config


def _refuse_wrong_types(args: argparse.Namespace, where: str) -> None:
    """Raises CheckpointError naming an argument that is not the number, truth value or text that Megatron has."""
    hints: dict[str, Any] = {**_OTHERS}
    for group in (ModelConfig, MoEConfig, DataConfig):
        hints |= get_type_hints(group)
    for name, hint in hints.items():
        value, kinds = getattr(args, name, None), [kind for kind in (hint, *get_args(hint)) if kind in _WORDS]
        if value is None or not kinds or name == "moe_layer_freq":
            continue
        is_right = type(value) in kinds or (type(value) is int and float in kinds)
        if not is_right or (type(value) in (int, float) and finite_float(value) is None):
            raise CheckpointError(f"{where}: the argument {name} is {shown(value)}; it must be {_WORDS[kinds[-1]]}.")


def _is(value: object, other: object) -> bool:
    return not isinstance(value, torch.Tensor) and value == other


def _refuse_unsupported(args: argparse.Namespace, where: str) -> None:
    wrong = [
        f"{name} is {shown(getattr(args, name))}"
        for name, harmless in UNSUPPORTED.items()
        if hasattr(args, name) and not any(_is(getattr(args, name), value) for value in harmless)
    ]
    for name, known in (
        ("normalization", ("LayerNorm", "RMSNorm")),
        ("moe_router_score_function", ("softmax", "sigmoid")),
        ("position_embedding_type", ("learned_absolute", "rope", "none")),
    ):
        value = getattr(args, name, None)
        if value is not None and not any(_is(value, one) for one in known):
            wrong.append(f"{name} is {shown(value)}")
    exact_gelu = getattr(args, "bias_gelu_fusion", True) is False and not getattr(args, "openai_gelu", False)
    if exact_gelu and not getattr(args, "swiglu", False):
        wrong.append("bias_gelu_fusion is False (exact GELU, which is not read from these files)")
    if wrong:
        raise CheckpointError(f"{where} is of a model that this program cannot compute: {', '.join(wrong)}.")
