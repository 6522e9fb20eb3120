"""The weights of a whole model as the inference ops take them, made from the training model's parameters.

Where nothing changes the tensors are the parameters themselves; else they are converted layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.option import flag
from megatron_samoe.inference.serving import Precision, Serving
from megatron_samoe.models.attention import SelfAttention
from megatron_samoe.models.mlp import MLP
from megatron_samoe.models.norms import Norm as NormLayer
from megatron_samoe.models.norms import SplitNorm
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.moe.mixing import Mixing, SharedExpertGate
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT
from megatron_samoe.moe.sharing.combined import combine
from megatron_samoe.moe.sharing.selected import OneBank, one_bank
from megatron_samoe.moe.sharing.way import Banks
from megatron_samoe.ops.decode import stored
from megatron_samoe.ops.decode_parts import PAGE, AttentionLayer, ExpertStack, Norm, Routing, Weight
from megatron_samoe.ops.grouped_mlp import ExpertWeights


@dataclass(frozen=True)
class Mixed:
    """A pool's banks for one layer whose experts are combined when needed.

    Attributes:
        stack: all banks' experts, bank after bank.
        b1, b2: the layer's combined biases, fp32, or None.
        coefficients_2EP: fp32.
    """

    stack: ExpertStack
    b1: Tensor | None
    b2: Tensor | None
    coefficients_2EP: Tensor


@dataclass(frozen=True)
class DecodeLayer:
    """One layer. `experts` are routed, or the dense MLP without routing; `shared` is an MLP next to them, of whose weight
    `routing.mixing` decides."""

    attention: AttentionLayer
    mlp_norm: Norm
    routing: Routing | None
    experts: ExpertStack | Mixed
    shared: ExpertStack | None


@dataclass(frozen=True)
class DecodeModel:
    """A model.

    Attributes:
        words: [V, H], also the output matrix where weights are tied; positions: fp32 [positions, H], or None.
        cos_PR, sin_PR: rotary tables, or None.
        logit_cap: soft cap of the logits, or None.
    """

    layers: tuple[DecodeLayer, ...]
    words: Weight
    output: Weight
    positions: Tensor | None
    final_norm: Norm
    cos_PR: Tensor | None
    sin_PR: Tensor | None
    logit_cap: float | None = None

    def weights(self) -> list[Tensor]:
        """Returns every tensor of weights once; views of one tensor count as that tensor."""
        return list({id(t): t for t in _tensors(self)}.values())


def options_of_training_alone(config: ModelConfig) -> list[str]:
    """Returns the flags of a model that the inference ops do not have, so that the training model decodes it."""
    names = (
        "multi_latent_attention",
        "exact_gelu",
        "use_parallel_residual",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
    )
    return [flag(name) for name in names if getattr(config, name) != getattr(ModelConfig, name)]


def make_decode_model(model: RankModel, serving: Serving, dtype: Precision, num_pages: int) -> DecodeModel:
    """Returns the weights of a model in one process, in fp32, bf16 or int8; norms, biases and routers stay fp32.

    Args:
        serving: not "auto".
        num_pages: of the key-value cache, which is fp32 with fp32 weights and bf16 with others.
    """
    config, stage = model.config.model, model.chunks[0]
    assert not options_of_training_alone(config)
    builder = _ExpertBuilder(model, serving, dtype)
    layers = []
    for layer in stage.layers.values():
        attention = _attention(layer.attention, layer.attention_norm, dtype, num_pages)
        routing, shared = None, None
        experts: ExpertStack | Mixed
        if not layer.is_moe:
            experts = _single(layer.mlp, dtype)
        else:
            routing, experts = _routing(layer.moe), builder.experts(layer.moe)
            if layer.moe.shared_expert is not None:
                shared = _single(layer.moe.shared_expert, dtype)
        layers.append(DecodeLayer(attention, _norm(layer.mlp_norm), routing, experts, shared))
    words = stored(stage.embedding.word.weight[: model.vocab_size], dtype)
    tied = not config.untie_embeddings_and_output_weights
    output = words if tied else stored(stage.output.weight[: model.vocab_size], dtype)
    position = stage.embedding.position
    cos_PR, sin_PR = None, None
    if config.position_embedding_type == "rope":
        positions = torch.arange(config.max_positions, device=model.state.device)[None]
        cos_PR, sin_PR = (t[0, :, 0].contiguous() for t in rotary_tables(config, positions, torch.float32))
    return DecodeModel(
        tuple(layers),
        words,
        output,
        None if position is None else _fp32(position),
        _norm(stage.final_norm),
        cos_PR,
        sin_PR,
        config.final_logit_softcapping,
    )


def _fp32(t: Tensor) -> Tensor:
    return t.detach().float().contiguous()


def _maybe_fp32(t: Tensor | None) -> Tensor | None:
    return None if t is None else _fp32(t)


def _norm(layer: NormLayer | SplitNorm) -> Norm:
    return Norm(_fp32(layer.weight), _maybe_fp32(layer.bias), layer.epsilon, rms=layer.bias is None)


def _attention(attention: SelfAttention, norm: NormLayer, dtype: Precision, num_pages: int) -> AttentionLayer:
    qkv, output = stored(attention.qkv.weight, dtype), stored(attention.output.weight, dtype)
    groups, _, head_dim, _ = qkv.data.shape
    head_norms = None
    if attention.q_norm is not None and attention.k_norm is not None:
        head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))
    cache_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    device, rule = qkv.data.device, attention.rule()
    return AttentionLayer(
        norm=_norm(norm),
        qkv=qkv,
        qkv_bias=_maybe_fp32(attention.qkv.bias),
        head_norms=head_norms,
        output=output,
        output_bias=_maybe_fp32(attention.output.bias),
        keys=torch.zeros(num_pages, groups, head_dim, PAGE, dtype=cache_dtype, device=device),
        values=torch.zeros(num_pages, groups, PAGE, head_dim, dtype=cache_dtype, device=device),
        rule=replace(rule, sinks_A=_maybe_fp32(rule.sinks_A)),
        clip=attention.config.clip_qkv,
    )


def _routing(moe: MoELayer) -> Routing:
    router, mixing = moe.router, moe.mixing
    rule = router.rule()
    rule = replace(rule, bias_E=_maybe_fp32(rule.bias_E), candidates_E=_maybe_fp32(rule.candidates_E))
    scale = _fp32(router.scale) if rule.score_function == "norm" else None
    mixed = (_fp32(mixing.weight), _fp32(mixing.bias)) if isinstance(mixing, Mixing) else None
    gate = _fp32(mixing.weight) if isinstance(mixing, SharedExpertGate) else None
    return Routing(_fp32(router.weight), rule, scale, mixed, gate)


def _single(mlp: MLP, dtype: Precision) -> ExpertStack:
    parts = {"w1": mlp.fc1.weight, "w2": mlp.fc2.weight, "b1": mlp.fc1.bias, "b2": mlp.fc2.bias}
    weights = ExpertWeights(**{name: t[None] for name, t in parts.items() if t is not None})
    return _stack(weights, "swiglu" if mlp.gated else "gelu", dtype)


class _ExpertBuilder:
    """Makes the experts of MoE layers; what layers share exists once."""

    def __init__(self, model: RankModel, serving: Serving, dtype: Precision):
        self._model, self._serving, self._dtype = model, serving, dtype
        self._pools: dict[int, _Pool] = {}

    def experts(self, moe: MoELayer) -> ExpertStack | Mixed:
        """Returns a layer's experts; factors on a set are applied to results, whatever the way of serving."""
        mixture = self._model.mixture(moe)
        key = id(mixture.banks)
        if key not in self._pools:
            self._pools[key] = _Pool(mixture.banks, self._dtype)
        pool, a_2GP = self._pools[key], mixture.a_2GP
        if a_2GP is None:
            return pool.stack
        if mixture.combines and self._serving != "selected":
            return pool.folded(a_2GP) if self._serving == "folded" else pool.lent(a_2GP)
        one = one_bank(a_2GP)
        assert one is not None
        return pool.selected(one)


class _Pool:
    """Banks that layers share, one set, or a layer's own experts."""

    def __init__(self, banks: Banks, dtype: Precision):
        self._banks = banks.unsharded()  # [P, E, ...]
        self._num_banks, self._num_experts = self._banks.w1.shape[:2]
        self._activation, self._dtype = banks.activation, dtype

    @cached_property
    def stack(self) -> ExpertStack:
        """All banks' experts as they are served, bank after bank."""
        return _stack(self._banks.map(lambda t: t.flatten(0, 1)), self._activation, self._dtype)

    def selected(self, one: OneBank) -> ExpertStack:
        """Returns one bank's expert for each, at most scaled."""
        bank_2E, factor_2E = (t.expand(2, self._num_experts).contiguous() for t in (one.bank_2G, one.factor_2G))
        index_2E = bank_2E * self._num_experts + torch.arange(self._num_experts, device=bank_2E.device)
        factors = (None, None) if (factor_2E == 1).all() else tuple(factor_2E)
        return replace(
            self.stack, index1_E=index_2E[0], index2_E=index_2E[1], factor1_E=factors[0], factor2_E=factors[1]
        )

    def folded(self, a_2GP: Tensor) -> ExpertStack:
        """Returns a layer's experts, combined."""
        return _stack(ExpertWeights(**self._combined(a_2GP, tuple(ROW_OF_WEIGHT))), self._activation, self._dtype)

    def lent(self, a_2GP: Tensor) -> Mixed:
        """Returns what a layer's experts are combined of."""
        combined = self._combined(a_2GP, ("b1", "b2"))
        a_2EP = a_2GP.float().expand(2, self._num_experts, self._num_banks).contiguous()
        return Mixed(self.stack, combined.get("b1"), combined.get("b2"), a_2EP)

    def _combined(self, a_2GP: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        def one(name: str, bank: Tensor) -> Tensor:
            return combine(a_2GP[ROW_OF_WEIGHT[name]][None], bank, bank.new_empty((1, *bank.shape[1:])))[0]

        return {name: one(name, bank) for name, bank in self._banks.items() if name in names}


def _stack(weights: ExpertWeights, activation: str, dtype: Precision) -> ExpertStack:
    """Returns experts that each use the matrix of their number."""
    own = torch.arange(len(weights.w1), device=weights.w1.device)
    w1, w2 = (stored(w, dtype) for w in (weights.w1, weights.w2))
    return ExpertStack(w1, w2, _maybe_fp32(weights.b1), _maybe_fp32(weights.b2), activation == "swiglu", own, own)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [t for part in value for t in _tensors(part)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in _tensors(getattr(value, name))]
    return []
