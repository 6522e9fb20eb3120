"""A SaMoE without the work of combining: folded into a plain MoE, or with one bank chosen for each layer.

Folding computes every layer's experts once, as a step of training does, and gives up the pool: the result is as large
as the standard MoE that it equals. Selecting keeps the pool and lets each layer name one bank, so that layers share
storage and nothing has to be combined; the weights change, and by how much is said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.interop.edited_model import (
    EXPERT_WEIGHTS,
    FRACTIONS,
    POOL,
    EditedModel,
    ReadOnce,
    begin_edit,
    compute_dtype,
    model_names,
    moe_layers,
    require_family,
    source_config,
)
from megatron_samoe.interop.gram import bank_inner_products
from megatron_samoe.interop.pool_surgery import default_pool_fields
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT, normalize_coefficients
from megatron_samoe.moe.sharing.combined import combine

Scale = Literal["keep", "one"]


def fold_samoe(source: GlobalTensors) -> EditedModel:
    """Returns the plain MoE that computes what a SaMoE computes, in the model's precision.

    Raises:
        ConfigError: the source is no SaMoE.
    """
    config = source_config(source)
    require_family(config, "samoe", "fold")
    folded = replace(config.moe, expert_layout="moe", **default_pool_fields())  # type: ignore[arg-type]
    optimizer = replace(config.optimizer, samoe_coefficient_lr_mult=1.0)
    edited = begin_edit(source, replace(config, moe=folded, optimizer=optimizer))
    for name in model_names(source):
        if not name.startswith(POOL) and not name.endswith(".moe.combination"):
            edited.keep(source, name)
    read_bank, layers = ReadOnce(source), [place.index for place in moe_layers(config)]
    for kind in EXPERT_WEIGHTS:
        if POOL + kind not in source.tensors:
            continue
        for layer in layers:

            def combined(kind: str = kind, layer: int = layer) -> Tensor:
                a_2GP = read_coefficients(source, layer, config.moe.samoe_normalization)
                return combined_weights(a_2GP[ROW_OF_WEIGHT[kind]], read_bank(POOL + kind), compute_dtype(source))

            shape = source.tensors[POOL + kind].shape[1:]
            edited.add(f"layers.{layer}.moe.experts.{kind}", shape, compute_dtype(source), combined)
    if FRACTIONS in source.tensors:
        edited.keep(source, FRACTIONS)
    banks, ratio = config.moe.num_expert_banks, len(layers) / config.moe.num_expert_banks
    edited.report.append(
        f"fold: {banks} banks into {len(layers)} layers of {config.moe.num_experts} experts each, "
        f"{ratio:.1f} times the expert parameters."
    )
    return edited


def read_coefficients(source: GlobalTensors, layer: int, normalization: str) -> Tensor:
    """Returns a layer's weights of banks, [2, G, P], normalised as the model does."""
    return normalize_coefficients(source.read(f"layers.{layer}.moe.combination"), normalization)


def combined_weights(a_GP: Tensor, bank: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns one layer's effective weights [E, ...] of banks [P, E, ...], as training makes them."""
    out = bank.new_empty((1, *bank.shape[1:]), dtype=dtype)
    return combine(a_GP[None].to(bank.dtype), bank, out)[0]


@dataclass(frozen=True)
class Selection:
    """One row of a layer's coefficients, sharpened.

    Attributes:
        a_GP: at most one entry of each row is not 0.
        change: norm of the change of the effective weights over their norm.
    """

    a_GP: Tensor
    change: float


def select_bank(a_GP: Tensor, gram_GPP: Tensor, scale: Scale) -> Selection:
    """Returns the one-bank row that changes the effective weights least.

    Args:
        gram_GPP: inner products of the banks, fp64.
        scale: keep: the chosen bank keeps its coefficient; one: it gets 1, so that a layer is exactly a bank.
    """
    a_GP = a_GP.double()
    num_banks = a_GP.shape[1]
    kept_GBP = torch.diag_embed(a_GP) if scale == "keep" else torch.eye(num_banks).double().expand(len(a_GP), -1, -1)
    gone_GBP = a_GP[:, None] - kept_GBP
    lost_GB = torch.einsum("gbi,gij,gbj->gb", gone_GBP, gram_GPP, gone_GBP).clamp_min(0)
    choice_G = lost_GB.argmin(1)
    every = torch.arange(len(a_GP))
    norm = torch.einsum("gi,gij,gj->", a_GP, gram_GPP, a_GP).clamp_min(1e-300)
    return Selection(kept_GBP[every, choice_G].float(), float((lost_GB[every, choice_G].sum() / norm).sqrt()))


def select_samoe(source: GlobalTensors, scale: Scale = "keep") -> EditedModel:
    """Returns the SaMoE whose layers each use one bank; banks and everything else stay as they are.

    Coefficients of the result are not normalised, and frozen unless training says otherwise.

    Raises:
        ConfigError: the source is no SaMoE.
    """
    config = source_config(source)
    require_family(config, "samoe", "select")
    moe = replace(config.moe, samoe_normalization="none", samoe_freeze_coefficients=True)
    optimizer = replace(config.optimizer, samoe_coefficient_lr_mult=1.0)
    edited = begin_edit(source, replace(config, moe=moe, optimizer=optimizer))
    grams = _bank_grams(source, config.moe.num_experts if config.moe.samoe_granularity == "expert" else 1)
    chosen: dict[int, list[Selection]] = {}
    for place in moe_layers(config):
        a_2GP = read_coefficients(source, place.index, config.moe.samoe_normalization)
        chosen[place.index] = [select_bank(a_2GP[row], grams[row], scale) for row in (0, 1)]
    for name in [*model_names(source), *([FRACTIONS] if FRACTIONS in source.tensors else [])]:
        edited.keep(source, name)
    for layer, rows in chosen.items():
        name = f"layers.{layer}.moe.combination"
        a_2GP = torch.stack([row.a_GP for row in rows])
        edited.add(name, tuple(a_2GP.shape), source.tensors[name].dtype, lambda a=a_2GP: a)
    edited.report += _report(chosen, config.moe.num_expert_banks, scale)
    return edited


def _bank_grams(source: GlobalTensors, groups: int) -> list[Tensor]:
    grams: list[Tensor | None] = [None, None]
    for kind in EXPERT_WEIGHTS:
        if POOL + kind in source.tensors:
            bank = source.read(POOL + kind)
            gram = bank_inner_products(bank.reshape(bank.shape[0], groups, -1))
            row, so_far = ROW_OF_WEIGHT[kind], grams[ROW_OF_WEIGHT[kind]]
            grams[row] = gram if so_far is None else so_far + gram
    return [gram for gram in grams if gram is not None]


def _report(chosen: dict[int, list[Selection]], num_banks: int, scale: Scale) -> list[str]:
    kept = "the chosen bank keeps its coefficient" if scale == "keep" else "the chosen bank's coefficient becomes 1"
    lines = [f"select: one of {num_banks} banks for each layer; {kept}.",
             "layer  bank of w1  coefficient  change of w1   bank of w2  coefficient  change of w2"]  # fmt: skip
    used: set[int] = set()
    for layer, rows in chosen.items():
        cells = []
        for row in rows:
            banks_G = row.a_GP.abs().argmax(1)
            used |= set(banks_G.tolist())
            values_G = row.a_GP.gather(1, banks_G[:, None])[:, 0]
            bank = str(int(banks_G[0])) if len(banks_G) == 1 else "per expert"
            value = f"{float(values_G[0]):11.4f}" if len(banks_G) == 1 else f"{float(values_G.mean()):6.4f} mean"
            cells.append(f"{bank:>10}  {value:>11}  {row.change:12.2e}")
        lines.append(f"{layer:5}  " + "   ".join(cells))
    if unused := sorted(set(range(num_banks)) - used):
        lines.append(f"No layer uses bank {', '.join(map(str, unused))}.")
    return lines
