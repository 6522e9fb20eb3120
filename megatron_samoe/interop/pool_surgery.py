"""A trained MoE poured into a pool of banks: the SaMoE that comes nearest to it.

Experts of different layers have no common numbering, so each layer's are first matched with those of the others
(`bank_fit.match_experts`) and its router's rows are reordered likewise, which changes nothing. Then all layers are
projected on the P banks that lose least, w1 and b1 with one set of coefficients, w2 and b2 with another, as SaMoE
computes. A MoE whose experts are combinations of P banks comes back up to rounding.

Neurons within an expert are not matched: the numbering of its F hidden units is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.interop.bank_fit import BankFit, fit_banks, match_experts, role_gram
from megatron_samoe.interop.edited_model import (
    EXPERT_WEIGHTS,
    POOL,
    EditedModel,
    add_fractions,
    begin_edit,
    model_names,
    moe_layers,
    require_family,
    source_config,
)
from megatron_samoe.interop.gram import inner_products
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT

Granularity = Literal["layer", "expert"]


def pool_moe(source: GlobalTensors, num_banks: int, granularity: Granularity = "layer") -> EditedModel:
    """Returns the SaMoE of `num_banks` banks that is nearest to a MoE; all inner products are taken now.

    Args:
        granularity: one set of coefficients per layer, or per layer and expert.

    Raises:
        ConfigError: the source is no MoE, or has fewer MoE layers than banks.
    """
    config = source_config(source)
    require_family(config, "moe", "pool")
    layers = [place.index for place in moe_layers(config)]
    if not 1 <= num_banks <= len(layers):
        raise ConfigError("--num-expert-banks", num_banks, f"must be from 1 to the number of MoE layers, {len(layers)}")
    edited = begin_edit(source, _pooled_config(config, num_banks, granularity))
    kinds = [kind for kind in EXPERT_WEIGHTS if _name(layers[0], kind) in source.tensors]
    grams = [_gram_of_row(source, layers, [k for k in kinds if ROW_OF_WEIGHT[k] == row]) for row in (0, 1)]
    order_LE = match_experts(grams, num_banks)
    fits = [fit_banks(role_gram(gram, order_LE, granularity == "expert"), num_banks) for gram in grams]

    for name in model_names(source):
        if ".moe.experts." not in name and not name.endswith(".moe.router.weight"):
            edited.keep(source, name)
    _add_layers(edited, source, layers, order_LE, fits)
    _add_banks(edited, source, layers, kinds, order_LE, fits, num_banks)
    add_fractions(edited, source, len(layers), config.moe.num_experts, order_LE)
    edited.report += _report(layers, order_LE, fits, num_banks)
    return edited


def _pooled_config(config: PretrainConfig, num_banks: int, granularity: Granularity) -> PretrainConfig:
    return replace(
        config,
        moe=replace(config.moe, expert_layout="samoe", num_expert_banks=num_banks, samoe_granularity=granularity),
    )


def _name(layer: int, kind: str) -> str:
    return f"layers.{layer}.moe.experts.{kind}"


def _gram_of_row(source: GlobalTensors, layers: list[int], kinds: list[str]) -> Tensor:
    """Returns inner products over the tensors that share a row of coefficients."""

    def reader(kind: str) -> Callable[[int], Tensor]:
        return lambda number: source.read(_name(layers[number], kind)).flatten(1)

    num_experts = source.tensors[_name(layers[0], kinds[0])].shape[0]
    return torch.stack([inner_products(reader(kind), len(layers), num_experts) for kind in kinds]).sum(0)


def _add_layers(
    edited: EditedModel, source: GlobalTensors, layers: list[int], order_LE: Tensor, fits: list[BankFit]
) -> None:
    for number, layer in enumerate(layers):
        router = f"layers.{layer}.moe.router.weight"
        stored = source.tensors[router]

        def reordered(router: str = router, order_E: Tensor = order_LE[number]) -> Tensor:
            return source.read(router)[order_E]

        edited.add(router, stored.shape, stored.dtype, reordered)
        a_2GP = torch.stack([fit.coefficients_LGP[number] for fit in fits]).float()
        edited.add(f"layers.{layer}.moe.combination", tuple(a_2GP.shape), torch.float32, lambda a=a_2GP: a)


def _add_banks(
    edited: EditedModel, source: GlobalTensors, layers: list[int], kinds: list[str], order_LE: Tensor,
    fits: list[BankFit], num_banks: int,
) -> None:  # fmt: skip
    for kind in kinds:
        mixture_PGL = fits[ROW_OF_WEIGHT[kind]].mixture_PGL
        shape = (num_banks, *source.tensors[_name(layers[0], kind)].shape)

        def mixed(kind: str = kind, mixture_PGL: Tensor = mixture_PGL, shape: tuple[int, ...] = shape) -> Tensor:
            bank = torch.zeros(shape)
            for number, layer in enumerate(layers):
                weights = source.read(_name(layer, kind))[order_LE[number]].float()
                add_mixed(bank, mixture_PGL[:, :, number], weights)
            return bank

        # Banks are their own master weights, fp32 in every precision.
        edited.add(POOL + kind, shape, torch.float32, mixed)


def add_mixed(bank_PE: Tensor, factor_PG: Tensor, weights_E: Tensor) -> None:
    """Adds factor[p, g] * weights[e] to bank[p, e], where g is e or, with G = 1, all."""
    num_experts = weights_E.shape[0]
    for bank_E, factor_G in zip(bank_PE, factor_PG.expand(-1, num_experts), strict=True):
        for expert in range(num_experts):
            if factor := float(factor_G[expert]):
                bank_E[expert].add_(weights_E[expert], alpha=factor)


def _report(layers: list[int], order_LE: Tensor, fits: list[BankFit], num_banks: int) -> list[str]:
    own_E = torch.arange(order_LE.shape[1])
    errors_2L = [fit.relative_error_L.tolist() for fit in fits]
    lines = [f"pool: {len(layers)} layers of {len(own_E)} experts into {num_banks} banks of as many.",
             "layer  experts renumbered  lost of w1, b1  lost of w2, b2   (norm of the difference / norm)"]  # fmt: skip
    for number, layer in enumerate(layers):
        moved = int((order_LE[number] != own_E).sum())
        lines.append(f"{layer:5}  {moved:18}  {errors_2L[0][number]:14.2e}  {errors_2L[1][number]:14.2e}")
    total = [float(((f.lost_LG * f.norm_LG).sum() / f.norm_LG.sum()).sqrt()) for f in fits]
    lines.append(f"{'all':>5}  {'':18}  {total[0]:14.2e}  {total[1]:14.2e}")
    return lines


def default_pool_fields() -> dict[str, object]:
    """Returns the pool's options as they stand where there is no pool."""
    default = MoEConfig()
    names = ("num_expert_banks", "samoe_combine", "samoe_granularity", "samoe_normalization", "samoe_init",
             "samoe_pool_placement", "pool_replica_check_interval", "samoe_freeze_coefficients")  # fmt: skip
    return {name: getattr(default, name) for name in names}
