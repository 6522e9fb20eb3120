"""The weights of a whole model as the inference ops take them, made from the training model's parameters.

Where nothing changes the tensors are the parameters themselves; else they are converted layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.inference.serving import OneBank, Precision, Serving, coefficients_of, selected_banks
from megatron_samoe.models.attention import SelfAttention
from megatron_samoe.models.mlp import MLP
from megatron_samoe.models.norms import Norm as NormLayer
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT
from megatron_samoe.moe.sharing.combined import combine
from megatron_samoe.ops.decode import PAGE, AttentionLayer, ExpertStack, Norm, Routing, Weight, stored


@dataclass(frozen=True)
class Banks:
    """A pool's banks for one layer whose experts are combined when needed.

    Attributes:
        w1, w2: one [E, (2,) F, H] and [E, H, F] for each bank, in the precision of serving.
        b1, b2: the layer's combined biases, fp32, or None.
        coefficients_2EP: fp32.
    """

    w1: tuple[Weight, ...]
    w2: tuple[Weight, ...]
    b1: Tensor | None
    b2: Tensor | None
    coefficients_2EP: Tensor
    gated: bool


@dataclass(frozen=True)
class DecodeLayer:
    """One layer. `experts` are routed, or the dense MLP without routing; `shared` is an MLP beside them."""

    attention: AttentionLayer
    mlp_norm: Norm
    routing: Routing | None
    experts: ExpertStack | Banks
    shared: ExpertStack | None


@dataclass(frozen=True)
class DecodeModel:
    """A model.

    Attributes:
        words: [V, H], also the output matrix where weights are tied; positions: fp32 [positions, H], or None.
        cos_PR, sin_PR: rotary tables, or None.
    """

    layers: tuple[DecodeLayer, ...]
    words: Weight
    output: Weight
    positions: Tensor | None
    final_norm: Norm
    cos_PR: Tensor | None
    sin_PR: Tensor | None

    def weights(self) -> list[Tensor]:
        """Returns every tensor of weights once; views of one tensor count as that tensor."""
        return list({id(t): t for t in _tensors(self)}.values())


def make_decode_model(model: RankModel, serving: Serving, dtype: Precision, num_pages: int) -> DecodeModel:
    """Returns the weights of a model in one process, in fp32, bf16 or int8; norms, biases and routers stay fp32.

    Args:
        serving: not "auto".
        num_pages: of the key-value cache, which is fp32 beside fp32 weights and bf16 beside others.
    """
    config, stage = model.config.model, model.chunks[0]
    builder = _PoolBuilder(model, serving, dtype) if model.expert_pool is not None else None
    layers = []
    for layer in stage.layers.values():
        attention = _attention(layer.attention, layer.attention_norm, dtype, num_pages)
        routing, shared = None, None
        experts: ExpertStack | Banks
        if not layer.is_moe:
            experts = _single(layer.mlp, dtype)
        else:
            routing = _routing(layer, model)
            experts = _own(layer, dtype) if builder is None else builder.layer(layer.moe.moe_index)
            if layer.moe.shared_expert is not None:
                shared = _single(layer.moe.shared_expert, dtype)
        layers.append(DecodeLayer(attention, _norm(layer.mlp_norm), routing, experts, shared))
    words = stored(stage.embedding.word.weight[: model.vocab_size], dtype)
    tied = not config.untie_embeddings_and_output_weights
    output = words if tied else stored(stage.output.weight[: model.vocab_size], dtype)
    position = stage.embedding.position
    cos_PR, sin_PR = None, None
    if config.position_embedding_type == "rope":
        places = torch.arange(config.max_positions, device=model.state.device)[None]
        cos_PR, sin_PR = (t[0, :, 0].contiguous() for t in rotary_tables(config, places, torch.float32))
    return DecodeModel(
        tuple(layers), words, output, None if position is None else _fp32(position), _norm(stage.final_norm), cos_PR,
        sin_PR,
    )  # fmt: skip


def _fp32(t: Tensor) -> Tensor:
    return t.detach().float().contiguous()


def _maybe_fp32(t: Tensor | None) -> Tensor | None:
    return None if t is None else _fp32(t)


def _norm(layer: NormLayer) -> Norm:
    return Norm(_fp32(layer.weight), _maybe_fp32(layer.bias), layer.epsilon, rms=layer.bias is None)


def _attention(attention: SelfAttention, norm: NormLayer, dtype: Precision, num_pages: int) -> AttentionLayer:
    qkv, output = stored(attention.qkv.weight, dtype), stored(attention.output.weight, dtype)
    groups, _, head_dim, _ = qkv.data.shape
    head_norms = None
    if attention.q_norm is not None and attention.k_norm is not None:
        head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))
    cache = torch.float32 if dtype == "fp32" else torch.bfloat16
    device = qkv.data.device
    return AttentionLayer(
        _norm(norm), qkv, _maybe_fp32(attention.qkv.bias), head_norms, output, _maybe_fp32(attention.output.bias),
        torch.zeros(num_pages, groups, head_dim, PAGE, dtype=cache, device=device),
        torch.zeros(num_pages, groups, PAGE, head_dim, dtype=cache, device=device),
    )  # fmt: skip


def _routing(layer: TransformerLayer, model: RankModel) -> Routing:
    moe = model.config.moe
    sigmoid = moe.moe_router_score_function == "sigmoid"
    return Routing(_fp32(layer.moe.router.weight), moe.moe_router_topk, sigmoid, moe.pre_softmax)


def _single(mlp: MLP, dtype: Precision) -> ExpertStack:
    one = torch.zeros(1, dtype=torch.int64, device=mlp.fc1.weight.device)
    b1, b2 = (_maybe_fp32(fc.bias) for fc in (mlp.fc1, mlp.fc2))
    w1, w2 = (stored(fc.weight[None], dtype) for fc in (mlp.fc1, mlp.fc2))
    return ExpertStack(w1, w2, None if b1 is None else b1[None], None if b2 is None else b2[None], mlp.gated, one, one)


def _own(layer: TransformerLayer, dtype: Precision) -> ExpertStack:
    experts = layer.moe.experts
    own = torch.arange(experts.w1.shape[0], device=experts.w1.device)
    return ExpertStack(
        stored(experts.w1, dtype), stored(experts.w2, dtype), _maybe_fp32(getattr(experts, "b1", None)),
        _maybe_fp32(getattr(experts, "b2", None)), experts.activation == "swiglu", own, own,
    )  # fmt: skip


class _PoolBuilder:
    """Makes a SaMoE's layers: all of one way of serving, which share what they can."""

    def __init__(self, model: RankModel, serving: Serving, dtype: Precision):
        assert model.expert_pool is not None
        pool = model.expert_pool
        self._gated, self._serving, self._dtype = pool.activation == "swiglu", serving, dtype
        self._banks = {name: store.whole() for name, store in pool.stores.items()}  # fp32 [P, E, ...]
        self._num_banks, self._num_experts = self._banks["w1"].shape[:2]
        self._coefficients = coefficients_of(model)
        self._selected = selected_banks(model) if serving == "selected" else None
        if serving != "folded":
            self._stored = {name: stored(self._banks[name], dtype) for name in ("w1", "w2")}

    def layer(self, moe_index: int) -> ExpertStack | Banks:
        if self._serving == "folded":
            return self._folded(moe_index)
        if self._selected is not None:
            return self._select(self._selected[moe_index])
        whole = self._stored
        w1, w2 = (tuple(_bank(whole[name], p) for p in range(self._num_banks)) for name in ("w1", "w2"))
        a_2GP = self._coefficients[moe_index].float()
        a_2EP = a_2GP.expand(2, self._num_experts, self._num_banks).contiguous()
        return Banks(w1, w2, self._bias("b1", moe_index), self._bias("b2", moe_index), a_2EP, self._gated)

    def _combined(self, name: str, moe_index: int) -> Tensor:
        bank = self._banks[name]
        out = bank.new_empty((1, *bank.shape[1:]))
        return combine(self._coefficients[moe_index][ROW_OF_WEIGHT[name]][None], bank, out)[0]

    def _bias(self, name: str, moe_index: int) -> Tensor | None:
        return _fp32(self._combined(name, moe_index)) if name in self._banks else None

    def _folded(self, moe_index: int) -> ExpertStack:
        own = torch.arange(self._num_experts, device=self._banks["w1"].device)
        w1, w2 = (stored(self._combined(name, moe_index), self._dtype) for name in ("w1", "w2"))
        return ExpertStack(w1, w2, self._bias("b1", moe_index), self._bias("b2", moe_index), self._gated, own, own)

    def _select(self, one: OneBank) -> ExpertStack:
        own = torch.arange(self._num_experts, device=one.bank_2E.device)
        index_2E = one.bank_2E * self._num_experts + own
        w1, w2 = (Weight(w.data.flatten(0, 1), None if w.scale is None else w.scale.flatten(0, 1))
                  for w in (self._stored["w1"], self._stored["w2"]))  # fmt: skip
        b1, b2 = (_fp32(self._banks[n].flatten(0, 1)) if n in self._banks else None for n in ("b1", "b2"))
        factors = (None, None) if (one.factor_2E == 1).all() else (one.factor_2E[0], one.factor_2E[1])
        return ExpertStack(w1, w2, b1, b2, self._gated, index_2E[0], index_2E[1], *factors)


def _bank(whole: Weight, bank: int) -> Weight:
    return Weight(whole.data[bank], None if whole.scale is None else whole.scale[bank])


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [t for part in value for t in _tensors(part)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in _tensors(getattr(value, name))]
    return []
