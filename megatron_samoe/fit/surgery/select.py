"""`edit select`: each layer takes one bank instead of a combination, so that layers share storage and nothing is combined.

The weights change, and the report says by how much. What is selected is kept as one-hot coefficients of the pool, or becomes tied sets,
of which w1 is used as it is; a factor on w2 goes into the weights of routing, where the router has one: the scale of
--moe-router-score-function norm, the weights of relu, or --moe-router-topk-scaling-factor if all layers want the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import TIED, ExpertSource, renumbered, written_map
from megatron_samoe.convert.edited_model import FRACTIONS, EditedModel, begin_edit, require, source_config, with_sharing
from megatron_samoe.convert.layer_experts import LayerExperts, layer_of, source_of, stored_experts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.gram import bank_inner_products
from megatron_samoe.models.layer_layout import LayerSpec
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT

Scale = Literal["keep", "one"]
#: Factors that differ by less are rounding.
EQUAL = 1e-5


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
    kept_GBP = torch.diag_embed(a_GP) if scale == "keep" else _unit_rows(a_GP)
    lost_GB = _lost(a_GP, kept_GBP, gram_GPP)
    choice_G = lost_GB.argmin(1)
    every = torch.arange(len(a_GP))
    lost = lost_GB[every, choice_G].sum() / _norm(a_GP, gram_GPP)
    return Selection(kept_GBP[every, choice_G].float(), float(lost.sqrt()))


def _unit_rows(a_GP: Tensor) -> Tensor:
    return torch.eye(a_GP.shape[1]).double().expand(len(a_GP), -1, -1)


def _lost(a_GP: Tensor, kept_GBP: Tensor, gram_GPP: Tensor) -> Tensor:
    """Returns the squared norm [G, B] of what weights lose that become `kept` combinations."""
    gone_GBP = a_GP[:, None] - kept_GBP
    return torch.einsum("gbi,gij,gbj->gb", gone_GBP, gram_GPP, gone_GBP).clamp_min(0)


def select_samoe(source: GlobalTensors, scale: Scale = "keep") -> EditedModel:
    """Returns the SaMoE whose layers each use one bank; banks and everything else stay as they are.

    Coefficients of the result are not normalised, and frozen unless training says otherwise.

    Raises:
        ConfigError: no layers of the source combine banks.
    """
    config = source_config(source)
    require(config.moe.has_pool, config, "expert_layout samoe, or combined layers", "select")
    experts = LayerExperts(source)
    moe = replace(config.moe, samoe_normalization="none", samoe_freeze_coefficients=True)
    optimizer = replace(config.optimizer, samoe_coefficient_lr_mult=1.0)
    edited = begin_edit(source, replace(config, moe=moe, optimizer=optimizer))
    combining = [place for place in experts.layers if source_of(place).way.combines]
    grams = _grams(experts, combining[0])
    chosen: dict[int, list[Selection]] = {}
    for place in combining:
        a_2GP = experts.coefficients(place)
        chosen[place.index] = [select_bank(a_2GP[row], grams[row], scale) for row in (0, 1)]
    if FRACTIONS in source.tensors:
        edited.keep(source, FRACTIONS)
    for layer, rows in chosen.items():
        name = f"layers.{layer}.moe.combination"
        a_2GP = torch.stack([row.a_GP for row in rows])
        edited.add_value(name, a_2GP.to(source.tensors[name].dtype))
    edited.report += _report(chosen, config.moe.num_expert_banks, scale)
    return edited


def _grams(experts: LayerExperts, place: LayerSpec) -> list[Tensor]:
    """Returns two Gram matrices [G, P, P] in fp64 of the banks that a layer uses: of w1 and b1, and of w2 and b2.

    G is 1, or E where each expert has coefficients of its own.
    """
    groups = experts.coefficients(place).shape[1]
    grams: dict[int, Tensor] = {}
    for kind in experts.kinds:
        bank, projection = experts.whole(place, kind), ROW_OF_WEIGHT[kind]
        gram = bank_inner_products(bank.reshape(bank.shape[0], groups, -1))
        grams[projection] = grams[projection] + gram if projection in grams else gram
    return [grams[0], grams[1]]


def _report(chosen: dict[int, list[Selection]], num_banks: int, scale: Scale) -> list[str]:
    kept = "the chosen bank keeps its coefficient" if scale == "keep" else "the chosen bank's coefficient becomes 1"
    lines = [
        f"select: one of {num_banks} banks for each layer; {kept}.",
        "layer  bank of w1  coefficient  change of w1   bank of w2  coefficient  change of w2",
    ]
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


def tie_selected(source: GlobalTensors, scale: Scale = "keep") -> EditedModel:
    """Returns the model whose layers each use one bank, or their set, as it is: all they share are tied sets.

    Args:
        scale: keep: w2 and b2 keep the factor that changes them least, in the weights of routing; one: it becomes 1.

    Raises:
        ConfigError: no layers of the source have coefficients, or its routers cannot hold their factors.
    """
    config = source_config(source)
    require(config.moe.has_coefficients, config, "combined or scaled layers", "select")
    experts = LayerExperts(source)
    grams: dict[str, list[Tensor]] = {}
    chosen: dict[int, list[Selection]] = {}
    for place in experts.layers:
        if source_of(place).way.mixes:
            stored = stored_experts(place)
            if stored not in grams:
                grams[stored] = _grams(experts, place)
            chosen[place.index] = _select_for_both(experts.coefficients(place), grams[stored], scale)
    banks = {layer: int(rows[0].a_GP[0].argmax()) for layer, rows in chosen.items()}
    factors = {p.index: float(chosen[p.index][1].a_GP[0].sum()) if p.index in chosen else 1.0 for p in experts.layers}
    config, scaled = _with_factors(config, factors)
    taken = [(source_of(p), banks.get(p.index, 0)) for p in experts.layers]
    keys = list(dict.fromkeys(taken))
    sources = renumbered([s if not s.way.is_shared else ExpertSource(TIED, keys.index((s, bank))) for s, bank in taken])

    def whole(place: LayerSpec, kind: str) -> Tensor:
        bank = banks.get(place.index, 0)
        return experts.whole(place, kind)[bank : bank + 1]

    edited = experts.reshared(with_sharing(config, sources), sources, whole)
    for name in [name for name in edited.tensors if name.endswith(scaled)]:
        tensor, factor = source.tensors[name], factors.get(layer_of(name) or 0, 1.0)
        edited.add(name, tensor.shape, tensor.dtype, partial(_times, source, name, factor))
    edited.report += _report(chosen, config.moe.num_expert_banks if config.moe.has_pool else 1, scale)
    edited.report.append(f"The layers become --expert-sharing {written_map(sources)}.")
    return edited


def _times(source: GlobalTensors, name: str, factor: float) -> Tensor:
    return source.read(name) * factor


def _select_for_both(a_2GP: Tensor, grams: Sequence[Tensor], scale: Scale) -> list[Selection]:
    """Returns one bank for both rows, that with 1 for w1 and one factor for w2 changes both least, as shares of their norms."""
    a_2GP = a_2GP.double()
    factors_B = torch.ones(a_2GP.shape[-1]).double()
    if scale == "keep":
        along_B = torch.einsum("gi,gib->b", a_2GP[1], grams[1])
        factors_B = along_B / torch.einsum("gbb->b", grams[1]).clamp_min(1e-300)
    kept = [_unit_rows(a_2GP[0]), _unit_rows(a_2GP[1]) * factors_B[:, None]]
    norms = [_norm(a_GP, gram) for a_GP, gram in zip(a_2GP, grams, strict=True)]
    lost_2B = torch.stack([_lost(*row).sum(0) / norm for row, norm in zip(zip(a_2GP, kept, grams), norms, strict=True)])  # noqa: B905
    bank = int(lost_2B.sum(0).argmin())
    return [
        Selection(rows[:1, bank].float(), float(lost.sqrt())) for rows, lost in zip(kept, lost_2B[:, bank], strict=True)
    ]


def _norm(a_GP: Tensor, gram_GPP: Tensor) -> Tensor:
    """Returns the squared norm of weights."""
    return _lost(a_GP, torch.zeros_like(a_GP)[:, None], gram_GPP).sum().clamp_min(1e-300)


def _with_factors(config: PretrainConfig, factors: Mapping[int, float]) -> tuple[PretrainConfig, tuple[str, ...]]:
    """Returns the configuration, and endings of routers' tensors to be multiplied, that give routing weights these factors."""
    moe, values = config.moe, sorted(factors.values())
    if values[0] == values[-1] == 1.0:
        return config, ()
    smallest = f"{values[0]:.4f} to {values[-1]:.4f}"
    advice = "--scale one drops the factors"
    if values[0] <= 0:
        raise ConfigError(
            "--scale",
            "keep",
            f"w2's factors are {smallest}, and weights of routing are positive, so cannot have them; {advice}",
        )
    if moe.moe_router_score_function == "norm":
        # Its scores are weights as they are; the thresholds grow equally, so the choice stays.
        return config, (".moe.router.scale", ".moe.router.expert_bias")
    if moe.moe_router_score_function == "relu":
        return config, (".moe.router.weight",)
    if values[-1] - values[0] > EQUAL * values[-1]:
        raise ConfigError(
            "--scale",
            "keep",
            f"w2's factors are {smallest} in different layers, which only routers of "
            f"--moe-router-score-function norm or relu can hold, not {moe.moe_router_score_function}; {advice}",
        )
    factor = sum(values) / len(values) * moe.weight_factor
    return replace(config, moe=replace(moe, moe_router_topk_scaling_factor=factor)), ()
