"""Which of llama.cpp's architectures computes a native model: rules, metadata and tensors.

The rules are what its source fixes for each (src/models/*.cpp): a form of routing, tied or untied outputs, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_samoe.convert.hf.families.base import Family, Rule, all_layers_are_moe, needs
from megatron_samoe.convert.hf.families.dense import LLAMA, QWEN2, QWEN3
from megatron_samoe.convert.hf.families.experts import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, weighs_among_chosen
from megatron_samoe.convert.hf.families.gpt import GPT2
from megatron_samoe.convert.hf.parts import View, at, keys, queries, rows, values, whole
from megatron_samoe.convert.hf.target import folded_model
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        name: general.architecture.
        family: Hugging Face's classes that compute the same.
        rules: what llama.cpp demands besides.
        pairs: whether rotary positions turn neighbouring channels (ours are half a head apart).
        needs_output: whether tied models, too, hold an output matrix.
    """

    name: str
    family: Family
    rules: tuple[Rule, ...]
    pairs: bool = False
    needs_output: bool = False

    def misfits(self, native: NativeModel) -> list[str]:
        """Returns why a folded native model is none of this architecture; empty where it fits."""
        ruled = [reason for rule in self.rules if (reason := rule(native)) is not None]
        return [*self.family.misfits(native), *ruled]


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file.

    Attributes:
        native: name of ours that it is made of.
        make: makes it.
        shape: as torch has it; the file lists it the other way round.
        is_plain: kept in fp32 in every precision.
    """

    name: str
    native: str
    make: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    is_plain: bool


_PLAIN_ROPE = needs("rope_scaling_type", None)
_NO_WINDOW = needs("sliding_window", None)


def _among_all(native: NativeModel) -> str | None:
    """Experts weigh by their score among all experts."""
    return None if native.moe.pre_softmax else "no --moe-router-pre-softmax (it weighs by scores among all experts)"


ARCHITECTURES = (
    Architecture("llama", LLAMA, (_PLAIN_ROPE, needs("disable_bias_linear", True)), pairs=True),
    Architecture("qwen2", QWEN2, (_PLAIN_ROPE, _NO_WINDOW, needs("disable_bias_linear", True))),
    Architecture("qwen3", QWEN3, (_PLAIN_ROPE, _NO_WINDOW)),
    Architecture("gpt2", GPT2, (needs("exact_gelu", False),)),
    Architecture("llama", MIXTRAL, (_PLAIN_ROPE, _NO_WINDOW), pairs=True),
    Architecture("qwen3moe", QWEN3_MOE, (_PLAIN_ROPE, all_layers_are_moe, weighs_among_chosen)),
    Architecture("olmoe", OLMOE, (_PLAIN_ROPE, needs("clip_qkv", None), _among_all, needs("group_query_attention", False)),
                 needs_output=True),
    Architecture("qwen2moe", QWEN2_MOE, (_PLAIN_ROPE, all_layers_are_moe, _among_all, needs("moe_shared_expert_gate", True)),
                 needs_output=True),
)  # fmt: skip


def choose_architecture(native: NativeModel) -> tuple[Architecture, NativeModel]:
    """Returns the architecture that computes a model, and the model folded.

    Raises:
        ConfigError: none does; the reason of each that comes near is named.
    """
    folded = folded_model(native) if native.moe.shares_experts else native
    reasons = []
    for one in ARCHITECTURES:
        misfits = one.misfits(folded)
        if not misfits:
            return one, folded
        if not misfits[0].startswith("--expert-layout"):
            more = f" (and {len(misfits) - 1} more)" if misfits[1:] else ""
            reasons.append(f"not {one.family.name}: {misfits[0]}{more}")
    raise ConfigError("--to", "gguf", f"llama.cpp has no architecture that computes this model: {'; '.join(reasons)}")


def metadata(one: Architecture, native: NativeModel) -> dict[str, Any]:
    """Returns what the file says of the model: gguf's writer has a method add_NAME for each."""
    model, moe = native.model, native.moe
    found: dict[str, Any] = {
        "context_length": model.max_positions, "embedding_length": model.hidden_size, "block_count": model.num_layers,
        "feed_forward_length": model.mlp_size, "head_count": model.num_attention_heads, "vocab_size": native.vocab_size,
    }  # fmt: skip
    if one.name == "gpt2":
        return {**found, "layer_norm_eps": model.norm_epsilon}
    found |= {
        "head_count_kv": model.num_kv_heads, "layer_norm_rms_eps": model.norm_epsilon,
        "rope_freq_base": float(model.rotary_base), "rope_dimension_count": model.head_dim,
        "key_length": model.head_dim, "value_length": model.head_dim,
    }  # fmt: skip
    if any(native.is_moe):
        found |= {
            "feed_forward_length": native.expert_size, "expert_count": moe.most_experts,
            "expert_used_count": moe.moe_router_topk, "expert_feed_forward_length": native.expert_size,
        }  # fmt: skip
        if moe.moe_shared_expert_intermediate_size is not None:
            found["expert_shared_feed_forward_length"] = moe.moe_shared_expert_intermediate_size
    return found


def tensors(one: Architecture, native: NativeModel) -> Iterator[GGUFTensor]:
    """Yields the file's tensors in the order of the layers."""
    words = "embedding.word.weight"
    yield _tensor(native, "token_embd.weight", words, rows(native.vocab_size))
    if native.model.untie_embeddings_and_output_weights or one.needs_output:
        tied = not native.model.untie_embeddings_and_output_weights
        yield _tensor(native, "output.weight", words if tied else "output.weight", rows(native.vocab_size))
    if "embedding.position" in native.tensors:
        yield _tensor(native, "position_embd.weight", "embedding.position")
    for layer in range(native.model.num_layers):
        ours, theirs = f"layers.{layer}", f"blk.{layer}"
        yield from _both(native, f"{theirs}.attn_norm", f"{ours}.attention_norm")
        yield from _attention(one, native, theirs, f"{ours}.attention")
        yield from _both(native, f"{theirs}.ffn_norm", f"{ours}.mlp_norm")
        if native.is_moe[layer]:
            yield from _experts(native, theirs, f"{ours}.moe")
        else:
            yield from _mlp(native, theirs, f"{ours}.mlp")
    yield from _both(native, "output_norm", "final_norm")


def _tensor(native: NativeModel, name: str, ours: str, view: View = whole, is_plain: bool = False) -> GGUFTensor:
    shape = tuple(view(native.parameters[ours]).shape)
    return GGUFTensor(name, ours, view, shape, is_plain or len(shape) == 1)


def _both(native: NativeModel, theirs: str, ours: str, view: View = whole) -> Iterator[GGUFTensor]:
    """Yields a weight, and a bias where there is one; the view is for both."""
    for kind in ("weight", "bias"):
        if f"{ours}.{kind}" in native.tensors:
            yield _tensor(native, f"{theirs}.{kind}", f"{ours}.{kind}", view)


def _attention(one: Architecture, native: NativeModel, theirs: str, ours: str) -> Iterator[GGUFTensor]:
    size = native.model.head_dim
    if one.name == "gpt2":  # all queries, then keys, then values

        def fused(t: Tensor) -> Tensor:
            return t.transpose(0, 1).flatten(0, 2)

        yield from _both(native, f"{theirs}.attn_qkv", f"{ours}.qkv", fused)
    else:
        for name, view in (("q", queries), ("k", keys), ("v", values)):
            yield from _both(
                native, f"{theirs}.attn_{name}", f"{ours}.qkv", _heads(view, size, one.pairs and name != "v")
            )
    yield from _both(native, f"{theirs}.attn_output", f"{ours}.output")
    for name in ("q", "k"):
        yield from _both(native, f"{theirs}.attn_{name}_norm", f"{ours}.{name}_norm")


def _heads(view: View, size: int, pairs: bool) -> View:
    """Returns a view of some heads' rows joined; with `pairs` channels that are half a head apart become neighbours."""

    def joined(t: Tensor) -> Tensor:
        taken = view(t)
        rest = taken.shape[3:] if view is queries else taken.shape[2:]
        taken = taken.reshape(-1, size, *rest)
        if pairs:
            taken = taken.reshape(len(taken), 2, size // 2, *rest).transpose(1, 2)
        return taken.reshape(-1, *rest)

    return joined


def _mlp(native: NativeModel, theirs: str, ours: str, suffix: str = "") -> Iterator[GGUFTensor]:
    if native.model.swiglu:
        for index, name in enumerate(("gate", "up")):
            yield from _both(native, f"{theirs}.ffn_{name}{suffix}", f"{ours}.fc1", at(index))
    else:
        yield from _both(native, f"{theirs}.ffn_up{suffix}", f"{ours}.fc1")
    yield from _both(native, f"{theirs}.ffn_down{suffix}", f"{ours}.fc2")


def _of_each(index: int) -> View:
    """Returns a view of one matrix of each expert, [E, 2, F, H] to [E, F, H]."""
    return lambda t: t[:, index]


def _experts(native: NativeModel, theirs: str, ours: str) -> Iterator[GGUFTensor]:
    yield _tensor(native, f"{theirs}.ffn_gate_inp.weight", f"{ours}.router.weight", is_plain=True)
    for index, name in enumerate(("gate", "up")):
        yield _tensor(native, f"{theirs}.ffn_{name}_exps.weight", f"{ours}.experts.w1", _of_each(index))
    yield _tensor(native, f"{theirs}.ffn_down_exps.weight", f"{ours}.experts.w2")
    if f"{ours}.mixing.weight" in native.tensors:
        yield _tensor(native, f"{theirs}.ffn_gate_inp_shexp.weight", f"{ours}.mixing.weight", lambda t: t.flatten())
    if f"{ours}.shared_expert.fc1.weight" in native.tensors:
        yield from _mlp(native, theirs, f"{ours}.shared_expert", "_shexp")
