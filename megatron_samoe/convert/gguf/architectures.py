"""Which of llama.cpp's architectures computes a native model: rules, metadata and tensors.

The rules are what its source fixes for each (src/models/*.cpp): a form of routing, tied or untied outputs, positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_samoe.convert.hf.families.base import Family, Rule, all_layers_are_moe, needs
from megatron_samoe.convert.hf.families.experts import (
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
    weighs_among_all,
    weighs_among_chosen,
)
from megatron_samoe.convert.hf.families.gpt import GPT2
from megatron_samoe.convert.hf.families.llama import LLAMA, QWEN2, QWEN3, gated, plain
from megatron_samoe.convert.hf.parts import (
    Part,
    Row,
    View,
    below,
    in_pairs,
    keys,
    module,
    parts_by,
    queries,
    stack,
    values,
    whole,
)
from megatron_samoe.convert.hf.target import folded_model
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError
from megatron_samoe.moe.scores import score_of


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        name: general.architecture.
        family: Hugging Face's classes that compute the same.
        rules: what else llama.cpp demands.
        pairs: whether rotary positions turn neighbouring channels (ours are half a head apart).
        needs_output: whether tied models, too, hold an output matrix.
    """

    name: str
    family: Family
    rules: tuple[Rule, ...]
    pairs: bool = False
    needs_output: bool = False

    def misfits(self, native: NativeModel) -> list[str]:
        """Returns why a folded native model does not fit this architecture; empty where it does."""
        ruled = [reason for rule in self.rules if (reason := rule(native)) is not None]
        return [*self.family.misfits(native), *ruled]


_PLAIN_ROPE = needs("rope_scaling_type", None)
_NO_WINDOW = needs("sliding_window", None)


ARCHITECTURES = (
    Architecture("llama", LLAMA, (_PLAIN_ROPE, needs("disable_bias_linear", True)), pairs=True),
    Architecture("qwen2", QWEN2, (_PLAIN_ROPE, _NO_WINDOW, needs("disable_bias_linear", True))),
    Architecture("qwen3", QWEN3, (_PLAIN_ROPE, _NO_WINDOW)),
    Architecture("gpt2", GPT2, (needs("exact_gelu", False),)),
    Architecture("llama", MIXTRAL, (_PLAIN_ROPE, _NO_WINDOW), pairs=True),
    Architecture("qwen3moe", QWEN3_MOE, (_PLAIN_ROPE, all_layers_are_moe, weighs_among_chosen)),
    Architecture(
        "olmoe",
        OLMOE,
        (_PLAIN_ROPE, needs("clip_qkv", None), weighs_among_all, needs("group_query_attention", False)),
        needs_output=True,
    ),
    Architecture(
        "qwen2moe",
        QWEN2_MOE,
        (_PLAIN_ROPE, all_layers_are_moe, weighs_among_all, needs("moe_shared_expert_gate", True)),
        needs_output=True,
    ),
)


def choose_architecture(native: NativeModel) -> tuple[Architecture, NativeModel]:
    """Returns the architecture that computes a model, and the model folded.

    Raises:
        ConfigError: none does; what the nearest one needs is named.
    """
    folded = folded_model(native) if native.moe.shares_experts else native
    for one in ARCHITECTURES:
        if not one.misfits(folded):
            return one, folded
    # A dense model is not told what a MoE would need: that is its first misfit there.
    near = [one for one in ARCHITECTURES if not one.misfits(folded)[0].startswith("--expert-layout")]
    nearest = min(near or ARCHITECTURES, key=lambda one: len(one.misfits(folded)))
    raise ConfigError(
        "--to",
        "gguf",
        f"llama.cpp has no architecture that computes this model; the nearest is {nearest.family.name}, "
        f"but for {', '.join(nearest.misfits(folded))}",
    )


def metadata(one: Architecture, native: NativeModel) -> dict[str, Any]:
    """Returns what the file says of the model: gguf's writer has a method add_NAME for each."""
    model, moe = native.model, native.moe
    found: dict[str, Any] = {
        "context_length": model.max_positions,
        "embedding_length": model.hidden_size,
        "block_count": model.num_layers,
        "feed_forward_length": model.mlp_size,
        "head_count": model.num_attention_heads,
        "vocab_size": native.vocab_size,
    }
    if one.name == "gpt2":
        return {**found, "layer_norm_eps": model.norm_epsilon}
    found |= {
        "head_count_kv": model.num_kv_heads,
        "layer_norm_rms_eps": model.norm_epsilon,
        "rope_freq_base": float(model.rotary_base),
        "rope_dimension_count": model.head_dim,
        "key_length": model.head_dim,
        "value_length": model.head_dim,
    }
    if any(native.is_moe):
        found |= {
            "feed_forward_length": native.expert_size,
            "expert_count": moe.most_experts,
            "expert_used_count": score_of(moe).topk,
            "expert_feed_forward_length": native.expert_size,
        }
        if moe.moe_shared_expert_intermediate_size is not None:
            found["expert_shared_feed_forward_length"] = moe.moe_shared_expert_intermediate_size
    return found


def tensors(one: Architecture, native: NativeModel) -> tuple[Part, ...]:
    """Returns the file's tensors in the order of the layers; shapes are torch's, which the file lists the other way round."""
    untied = native.model.untie_embeddings_and_output_weights
    output = "output.weight" if untied or not one.needs_output else "embedding.word.weight"
    mlp = gated if native.model.swiglu else plain
    theirs, ours = "blk.{layer}", "layers.{layer}"
    table = (
        Row("token_embd.weight", "embedding.word.weight"),
        Row("output.weight", output),
        Row("position_embd.weight", "embedding.position"),
        *module(f"{theirs}.attn_norm", f"{ours}.attention_norm"),
        *_attention(one, native.model.head_dim, theirs, f"{ours}.attention"),
        *module(f"{theirs}.ffn_norm", f"{ours}.mlp_norm"),
        *mlp(theirs, f"{ours}.mlp", names=("ffn_gate", "ffn_up", "ffn_down")),
        *below(
            theirs,
            f"{ours}.moe",
            ("ffn_gate_inp.weight", "router.weight"),
            ("ffn_gate_exps.weight", "experts.w1", _of_each(0), stack),
            ("ffn_up_exps.weight", "experts.w1", _of_each(1), stack),
            ("ffn_down_exps.weight", "experts.w2", whole, stack),
            ("ffn_gate_inp_shexp.weight", "mixing.weight", lambda t: t.flatten()),
        ),
        *mlp(theirs, f"{ours}.moe.shared_expert", names=("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")),
        *module("output_norm", "final_norm"),
    )
    return tuple(part for part in parts_by(table, native) if isinstance(part, Part))


def is_plain(part: Part) -> bool:
    """Returns whether a tensor is kept in fp32 in every precision."""
    return len(part.shape) == 1 or part.name.endswith("ffn_gate_inp.weight")


def _attention(one: Architecture, head_dim: int, theirs: str, ours: str) -> tuple[Row, ...]:
    # Channels that turn together are half a head apart in ours.
    order = in_pairs(0, head_dim) if one.pairs else ()
    if one.name == "gpt2":  # all queries, then keys, then values
        projections = module(f"{theirs}.attn_qkv", f"{ours}.qkv", lambda t: t.transpose(0, 1))
    else:
        projections = (
            *module(f"{theirs}.attn_q", f"{ours}.qkv", lambda t: queries(t).flatten(0, 1), None, 1.0, order),
            *module(f"{theirs}.attn_k", f"{ours}.qkv", keys, None, 1.0, order),
            *module(f"{theirs}.attn_v", f"{ours}.qkv", values),
        )
    norms = (module(f"{theirs}.attn_{name}_norm", f"{ours}.{name}_norm") for name in ("q", "k"))
    return (*projections, *module(f"{theirs}.attn_output", f"{ours}.output"), *(row for norm in norms for row in norm))


def _of_each(index: int) -> View:
    """Returns a view of one matrix of each expert, [E, 2, F, H] to [E, F, H]."""

    def view(t: Tensor) -> Tensor:
        return t[:, index]

    return view
