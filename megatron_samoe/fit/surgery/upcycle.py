"""A dense model made sparse: every expert begins as a copy of the MLP it replaces (sparse upcycling, arXiv:2212.05055).

The new model computes what the dense one does. With K experts chosen and weights p, experts that are copies give
sum_k p_k MLP(x), so the sum of weights must be 1:

- weights among the chosen sum to 1 whatever the router says: nothing is to be done;
- weights among all experts (top-1 always, top-k with --moe-router-pre-softmax) sum to K / E under an undecided router
  (K / 2 with sigmoid scores): w2 and b2 of the copies are divided by that, and the router starts so near to 0 that its
  logits spread by about 1e-3.

With `dense_mlp` "shared-expert" the MLP stays whole as the shared expert, and routed experts start random with w2 = 0:
exact for every router, and for a pool of fewer banks than layers, whose copies would not be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import COMBINED, OWN, ExpertSource
from megatron_samoe.convert.edited_model import (
    SHARED,
    EditedModel,
    add_fractions,
    begin_edit,
    compute_dtype,
    moe_layers,
    require,
    source_config,
    validate_model,
    with_sharing,
)
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.bank_fit import fit_banks
from megatron_samoe.fit.gram import gram_of_row
from megatron_samoe.fit.shared_model import FittedGroup, shared_groups, shared_model
from megatron_samoe.fit.surgery.pool import LOST, losses
from megatron_samoe.moe.scores import score_of
from megatron_samoe.moe.sharing.coefficients import bank_std_factor, initial_coefficients
from megatron_samoe.tensor_parallel.random import derived_seed

#: Spread of router logits at the start where it would change the loss.
UNDECIDED_LOGITS = 1e-3
#: The dense MLP's tensor that an expert's is a copy of.
MLP_TENSOR = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


@dataclass(frozen=True)
class UpcycleOptions:
    """How a dense model is made sparse.

    Attributes:
        moe: the experts that the new model has; its layout is moe or samoe.
        dense_mlp: experts: each expert is a copy; shared-expert: the MLP serves every token in addition to new experts.
        noise: spread of what is added to each copy, as a share of the weights' own spread; 0 for equal copies.
        router_std: spread of router weights; derived if None.
        seed: of routers, noise and new experts.
    """

    moe: MoEConfig
    dense_mlp: Literal["experts", "shared-expert"] = "experts"
    noise: float = 0.0
    router_std: float | None = None
    seed: int = 1234


def upcycle_dense(source: GlobalTensors, options: UpcycleOptions) -> EditedModel:
    """Returns the sparse model that starts as a dense one.

    Raises:
        ConfigError: the source is not dense, or the new experts do not fit it.
    """
    config = source_config(source)
    require(config.moe.expert_layout == "dense", config, "expert_layout dense", "upcycle")
    new = replace(config, moe=_new_moe(config, options))
    validate_model(new)
    if options.dense_mlp == "experts" and new.moe.has_pool:
        own = replace(new, moe=with_sharing(new, [ExpertSource(OWN)] * len(moe_layers(new))).moe)
        edited = _pooled(_Upcycling(source, own, options), new)
    else:
        edited = _Upcycling(source, new, options).model()
    edited.report.insert(0, _summary(new, options))
    return edited


@dataclass(frozen=True)
class _Upcycling:
    """Recipes of all tensors of a sparse model: of one whose layers own copies, or of one with new experts."""

    source: GlobalTensors
    config: PretrainConfig
    options: UpcycleOptions

    def model(self) -> EditedModel:
        edited = begin_edit(self.source, self.config, lambda name: False)
        model = NativeModel(self.config, int(self.source.train_state["vocab_size"]))
        for name, stored in model.tensors.items():
            old = name.replace(".moe.shared_expert.", ".mlp.")
            if old in self.source.tensors:
                edited.keep(self.source, old, name)
                continue
            is_fp32 = name.startswith(SHARED) or name.endswith((".router.weight", ".combination"))
            dtype = torch.float32 if is_fp32 else compute_dtype(self.source)
            edited.add(name, stored.shape, dtype, partial(self._new, name, stored.shape))
        add_fractions(edited, self.source, [layer.num_experts for layer in moe_layers(self.config)])
        return edited

    def _new(self, name: str, shape: tuple[int, ...]) -> Tensor:
        moe, seed = self.config.moe, derived_seed(self.options.seed, name)
        if name.endswith(".router.weight"):
            return _normal(shape, router_std(self.config, self.options), seed)
        if name.endswith(".combination"):
            layers = [layer.index for layer in moe_layers(self.config)]
            start_P = initial_coefficients(moe, layers.index(int(name.split(".")[1])), len(layers))
            return start_P.expand(shape).clone()
        if self.options.dense_mlp == "experts":
            return self._copies(name, shape)
        # Random w1 and nothing else: what routed experts add is 0 until w2, which begins at 0, is trained.
        std = self.config.model.init_method_std * (bank_std_factor(moe) if moe.has_pool else 1.0)
        return _normal(shape, std, seed) if name.endswith(".w1") else torch.zeros(shape)

    def _copies(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a layer's experts [E, ...]: copies of its dense MLP, with the noise that was asked for."""
        kind = name[-2:]
        mlp = self.source.read(name.replace(f".moe.experts.{kind}", f".mlp.{MLP_TENSOR[kind]}"))
        copies = (mlp / start_weight_sum(self.config.moe) if kind in ("w2", "b2") else mlp).expand(shape).clone()
        # Biases are not changed: they may well be 0, and the matrices' noise sets experts apart.
        if self.options.noise and kind[0] == "w":
            spread = float(copies[0].float().std(correction=0)) * self.options.noise
            for expert, copy in enumerate(copies):
                copy += _normal(mlp.shape, spread, derived_seed(self.options.seed, name, expert)).to(copy.dtype)
        return copies


def _pooled(copied: _Upcycling, config: PretrainConfig) -> EditedModel:
    """Returns the MLPs of all layers, as well as P banks can represent them, copied to the experts of each bank."""
    moe, layers = config.moe, moe_layers(config)
    if moe.samoe_normalization != "none":
        raise ConfigError("--samoe-normalization", moe.samoe_normalization, "must be none for copies of MLPs")
    plain, sources = copied.model(), [ExpertSource(COMBINED)] * len(layers)
    kinds = LayerExperts(plain).kinds

    def read_mlp(kind: str, number: int) -> Tensor:
        return copied.source.read(f"layers.{layers[number].index}.mlp.{MLP_TENSOR[kind]}").reshape(1, -1)

    grams = [gram_of_row(read_mlp, kinds, row, len(layers), 1)[:, 0, :, 0] for row in (0, 1)]
    fits = [fit_banks(gram_LL[None], moe.num_expert_banks) for gram_LL in grams]
    groups = layers[0].num_experts if moe.samoe_granularity == "expert" else 1
    stored = [replace(fit, coefficients_LGP=fit.coefficients_LGP.expand(-1, groups, -1)) for fit in fits]
    fitted = [FittedGroup(group, stored) for group in shared_groups(sources, moe.num_expert_banks)]
    edited = shared_model(plain, config, sources, fitted)
    edited.report.append(f"layer  {LOST}")
    edited.report += [f"{place.index:5}  {lost}" for place, lost in zip(layers, losses(fits), strict=True)]
    return edited


def _new_moe(config: PretrainConfig, options: UpcycleOptions) -> MoEConfig:
    moe = options.moe
    if moe.expert_layout == "dense":
        raise ConfigError("--expert-layout", "dense", "must be moe or samoe")
    for name, value in (("--noise", options.noise), ("--router-std", options.router_std or 0.0)):
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(name, value, "must be a finite number, 0 or more")
    if options.dense_mlp == "shared-expert":
        if options.noise:
            raise ConfigError("--noise", options.noise, "has no use with --dense-mlp shared-expert: nothing is copied")
        return replace(moe, moe_shared_expert_intermediate_size=config.model.mlp_size)
    if moe.moe_ffn_hidden_size not in (None, config.model.mlp_size):
        raise ConfigError(
            "--moe-ffn-hidden-size",
            moe.moe_ffn_hidden_size,
            f"must be the dense MLP's {config.model.mlp_size}, of which experts are copies; "
            "--dense-mlp shared-expert takes any",
        )
    return replace(moe, moe_ffn_hidden_size=config.model.mlp_size)


def start_weight_sum(moe: MoEConfig) -> float:
    """Returns the sum of a token's expert weights under a router whose logits are all 0."""
    return score_of(moe).undecided_sum(moe.most_experts)


def _normal(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed)).mul_(std)


def router_std(config: PretrainConfig, options: UpcycleOptions) -> float:
    """Returns the spread of new routers' weights."""
    if options.router_std is not None:
        return options.router_std
    if options.dense_mlp == "shared-expert" or not config.moe.pre_softmax:
        return config.model.init_method_std
    return UNDECIDED_LOGITS / config.model.hidden_size**0.5


def _summary(config: PretrainConfig, options: UpcycleOptions) -> str:
    moe = config.moe
    where = f"{len(moe_layers(config))} of {config.model.num_layers} layers, {moe.num_experts} experts, top-{score_of(moe).topk}"
    pool = f", a pool of {moe.num_expert_banks} banks" if moe.has_pool else ""
    if options.dense_mlp == "shared-expert":
        how = "the MLP stays as shared expert, routed experts begin with w2 = 0"
    else:
        factor = 1 / start_weight_sum(moe)
        how = f"experts are copies of the MLP, w2 and b2 times {factor:g}; noise {options.noise:g}"
    return f"upcycle: {where}{pool}; {how}; routers of spread {router_std(config, options):.2g}."
