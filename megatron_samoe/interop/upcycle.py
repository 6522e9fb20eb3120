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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.interop.bank_fit import BankFit, fit_banks
from megatron_samoe.interop.edited_model import (
    POOL,
    EditedModel,
    add_fractions,
    begin_edit,
    compute_dtype,
    model_names,
    moe_layers,
    require,
    source_config,
)
from megatron_samoe.interop.gram import inner_products
from megatron_samoe.models.blueprint import expert_shape
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT, bank_std_factor, initial_coefficients
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
        dense_mlp: experts: each expert is a copy; shared-expert: the MLP serves every token beside new experts.
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
    edited = begin_edit(source, new)
    layers = [place.index for place in moe_layers(new)]
    replaced = tuple(f"layers.{layer}.mlp." for layer in layers)
    for name in model_names(source):
        if not name.startswith(replaced):
            edited.keep(source, name)
        elif options.dense_mlp == "shared-expert":
            stored = source.tensors[name]
            shared = name.replace(".mlp.", ".moe.shared_expert.")
            edited.add(shared, stored.shape, stored.dtype, lambda name=name: source.read(name))
    _add_routers(edited, new, layers, options)
    if options.dense_mlp == "shared-expert":
        _add_new_experts(edited, source, new, layers, options)
    elif new.moe.has_pool:
        _add_copied_banks(edited, source, new, layers, options)
    else:
        _add_copied_experts(edited, source, new, layers, options)
    add_fractions(edited, source, [place.num_experts for place in moe_layers(new)])
    edited.report.insert(0, _summary(new, layers, options))
    return edited


def _new_moe(config: PretrainConfig, options: UpcycleOptions) -> MoEConfig:
    moe = options.moe
    if moe.expert_layout == "dense":
        raise ConfigError("--expert-layout", "dense", "must be moe or samoe")
    if not (options.noise >= 0 and math.isfinite(options.noise)):
        raise ConfigError("--noise", options.noise, "must be a finite number, 0 or more")
    if options.router_std is not None and not (options.router_std >= 0 and math.isfinite(options.router_std)):
        raise ConfigError("--router-std", options.router_std, "must be a finite number, 0 or more")
    if options.dense_mlp == "shared-expert":
        if options.noise:
            raise ConfigError("--noise", options.noise, "has no use with --dense-mlp shared-expert: nothing is copied")
        return replace(moe, moe_shared_expert_intermediate_size=config.model.mlp_size)
    if moe.moe_ffn_hidden_size not in (None, config.model.mlp_size):
        raise ConfigError(
            "--moe-ffn-hidden-size", moe.moe_ffn_hidden_size,
            f"must be the dense MLP's {config.model.mlp_size}, of which experts are copies; "
            "--dense-mlp shared-expert takes any",
        )  # fmt: skip
    return replace(moe, moe_ffn_hidden_size=config.model.mlp_size)


def start_weight_sum(moe: MoEConfig) -> float:
    """Returns the sum of a token's expert weights under a router whose logits are all 0."""
    if not moe.pre_softmax:
        return 1.0
    share = 0.5 if moe.moe_router_score_function == "sigmoid" else 1 / moe.num_experts
    return moe.moe_router_topk * share


def copy_to_experts(
    weight: Tensor, num_experts: int, factor: float = 1.0, noise: float = 0.0, seeds: tuple[int, ...] = ()
) -> Tensor:
    """Returns [E, ...] copies of factor * weight, each with its own noise of the weights' spread times `noise`."""
    copies = (weight * factor).expand(num_experts, *weight.shape).clone()
    if noise:
        spread = float(copies[0].float().std(correction=0)) * noise
        for copy, seed in zip(copies, seeds, strict=True):
            copy += _normal(weight.shape, spread, seed).to(copy.dtype)
    return copies


def _normal(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed)).mul_(std)


def _kinds(config: PretrainConfig) -> list[str]:
    return [kind for kind in MLP_TENSOR if kind[0] == "w" or not config.model.disable_bias_linear]


def _add_routers(edited: EditedModel, config: PretrainConfig, layers: list[int], options: UpcycleOptions) -> None:
    shape = (config.moe.num_experts, config.model.hidden_size)
    std = router_std(config, options)
    for layer in layers:
        name = f"layers.{layer}.moe.router.weight"
        seed = derived_seed(options.seed, name)
        edited.add(name, shape, torch.float32, lambda seed=seed: _normal(shape, std, seed))


def router_std(config: PretrainConfig, options: UpcycleOptions) -> float:
    """Returns the spread of new routers' weights."""
    if options.router_std is not None:
        return options.router_std
    if options.dense_mlp == "shared-expert" or not config.moe.pre_softmax:
        return config.model.init_method_std
    return UNDECIDED_LOGITS / config.model.hidden_size**0.5


def _copies(source: GlobalTensors, config: PretrainConfig, options: UpcycleOptions, kind: str, layer: int) -> Tensor:
    moe, name = config.moe, f"layers.{layer}.moe.experts.{kind}"
    factor = 1 / start_weight_sum(moe) if kind in ("w2", "b2") else 1.0
    # Biases are left alone: they may well be 0, and the matrices' noise sets experts apart.
    noise = options.noise if kind in ("w1", "w2") else 0.0
    seeds = tuple(derived_seed(options.seed, name, expert) for expert in range(moe.num_experts))
    return copy_to_experts(source.read(f"layers.{layer}.mlp.{MLP_TENSOR[kind]}"), moe.num_experts, factor, noise, seeds)


def _add_copied_experts(
    edited: EditedModel, source: GlobalTensors, config: PretrainConfig, layers: list[int], options: UpcycleOptions
) -> None:
    for layer in layers:
        for kind in _kinds(config):
            stored = source.tensors[f"layers.{layer}.mlp.{MLP_TENSOR[kind]}"]
            edited.add(
                f"layers.{layer}.moe.experts.{kind}", (config.moe.num_experts, *stored.shape), stored.dtype,
                lambda kind=kind, layer=layer: _copies(source, config, options, kind, layer),
            )  # fmt: skip


def _add_copied_banks(
    edited: EditedModel, source: GlobalTensors, config: PretrainConfig, layers: list[int], options: UpcycleOptions
) -> None:
    """The MLPs of all layers, as well as P banks can stand for them, copied to the experts of each bank."""
    moe = config.moe
    if moe.samoe_normalization != "none":
        raise ConfigError("--samoe-normalization", moe.samoe_normalization, "must be none for copies of MLPs")
    if moe.num_expert_banks > len(layers):
        raise ConfigError("--num-expert-banks", moe.num_expert_banks, f"must be at most the {len(layers)} MoE layers")
    kinds = _kinds(config)
    fits = [_fit_mlps(source, layers, [k for k in kinds if ROW_OF_WEIGHT[k] == row], moe.num_expert_banks)
            for row in (0, 1)]  # fmt: skip
    groups = moe.num_experts if moe.samoe_granularity == "expert" else 1
    for number, layer in enumerate(layers):
        a_2GP = torch.stack([fit.coefficients_LGP[number].expand(groups, -1) for fit in fits]).float()
        edited.add(f"layers.{layer}.moe.combination", tuple(a_2GP.shape), torch.float32, lambda a=a_2GP: a)
    for kind in kinds:
        shape = (moe.num_expert_banks, moe.num_experts, *source.tensors[f"layers.0.mlp.{MLP_TENSOR[kind]}"].shape)

        def bank(kind: str = kind, shape: tuple[int, ...] = shape) -> Tensor:
            mixture_PL = fits[ROW_OF_WEIGHT[kind]].mixture_PGL[:, 0]
            whole = torch.zeros(shape)
            for number, layer in enumerate(layers):
                if mixture_PL[:, number].any():
                    copies = _copies(source, config, options, kind, layer).float()
                    for bank_E, factor in zip(whole, mixture_PL[:, number].tolist(), strict=True):
                        bank_E.add_(copies, alpha=factor)
            return whole

        edited.add(POOL + kind, shape, torch.float32, bank)
    edited.report += ["layer  lost of w1, b1  lost of w2, b2   (norm of the difference / norm)"]
    errors_2L = [fit.relative_error_L.tolist() for fit in fits]
    edited.report += [
        f"{layer:5}  {first:14.2e}  {second:14.2e}" for layer, first, second in zip(layers, *errors_2L, strict=True)
    ]


def _fit_mlps(source: GlobalTensors, layers: list[int], kinds: list[str], num_banks: int) -> BankFit:
    def reader(kind: str) -> Callable[[int], Tensor]:
        return lambda number: source.read(f"layers.{layers[number]}.mlp.{MLP_TENSOR[kind]}").reshape(1, -1)

    gram_LL = torch.stack([inner_products(reader(kind), len(layers), 1) for kind in kinds]).sum(0)[:, 0, :, 0]
    return fit_banks(gram_LL[None], num_banks)


def _add_new_experts(
    edited: EditedModel, source: GlobalTensors, config: PretrainConfig, layers: list[int], options: UpcycleOptions
) -> None:
    """Random w1 and nothing else: what routed experts add is 0 until w2 has learnt."""
    moe, shape = config.moe, expert_shape(config, all_layers(config)[layers[0]])
    up = (2, shape.ffn_size) if shape.activation == "swiglu" else (shape.ffn_size,)
    inner = {"w1": (*up, shape.hidden_size), "b1": up, "w2": (shape.hidden_size, shape.ffn_size),
             "b2": (shape.hidden_size,)}  # fmt: skip
    std = config.model.init_method_std * (bank_std_factor(moe) if moe.has_pool else 1.0)
    leading = (moe.num_expert_banks,) if moe.has_pool else ()
    owners = [POOL] if moe.has_pool else [f"layers.{layer}.moe.experts." for layer in layers]
    dtype = torch.float32 if moe.has_pool else compute_dtype(source)
    for owner in owners:
        for kind in _kinds(config):
            whole = (*leading, moe.num_experts, *inner[kind])

            def recipe(name: str = owner + kind, whole: tuple[int, ...] = whole, kind: str = kind) -> Tensor:
                return _normal(whole, std, derived_seed(options.seed, name)) if kind == "w1" else torch.zeros(whole)

            edited.add(owner + kind, whole, dtype, recipe)
    if moe.has_pool:
        groups = moe.num_experts if moe.samoe_granularity == "expert" else 1
        for number, layer in enumerate(layers):
            a_2GP = initial_coefficients(moe, number, len(layers)).expand(2, groups, -1).clone()
            edited.add(f"layers.{layer}.moe.combination", tuple(a_2GP.shape), torch.float32, lambda a=a_2GP: a)


def _summary(config: PretrainConfig, layers: list[int], options: UpcycleOptions) -> str:
    moe = config.moe
    where = f"{len(layers)} of {config.model.num_layers} layers, {moe.num_experts} experts, top-{moe.moe_router_topk}"
    pool = f", a pool of {moe.num_expert_banks} banks" if moe.has_pool else ""
    if options.dense_mlp == "shared-expert":
        how = "the MLP stays as shared expert, routed experts begin with w2 = 0"
    else:
        factor = 1 / start_weight_sum(moe)
        how = f"experts are copies of the MLP, w2 and b2 times {factor:g}; noise {options.noise:g}"
    return f"upcycle: {where}{pool}; {how}; routers of spread {router_std(config, options):.2g}."
