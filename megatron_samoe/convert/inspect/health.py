"""Faults of a trained model whose files are sound.

An expert counts as never updated on the best evidence there is:

    start       an earlier checkpoint is given, and the expert's weights are the same in both, up to the factor by which
                weight decay shrinks them;
    moments     Adam's second moment of the expert's matrices is 0 throughout: no gradient has ever reached it (the moment
                of one that did decays, but does not become 0);
    seed        there are no moments: the weights are the ones that the run's seed draws, up to such a factor. Models that
                were imported or made by surgery did not begin so, and none of their experts is found this way.

A bank is dead in a layer where the size of its weight there is less than a share of the layer's largest one, and dead
altogether where it is dead in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.convert.edited_model import FRACTIONS, SHARED, moe_layers, source_config
from megatron_samoe.convert.inspect.numbers import statistics
from megatron_samoe.convert.layer_experts import LayerExperts, source_of
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import CheckpointError
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.parallel_state.parameter_tag import set_tag, tag_of
from megatron_samoe.parallel_state.state import single_process_state

Evidence = Literal["start", "moments", "seed"]
#: Share of an expert's norm that the rounding of many steps of weight decay may change.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass
class Health:
    """Findings on one model.

    Attributes:
        not_finite: by tensor, (NaNs, infinities).
        evidence: how never-updated experts were recognised; None for a model without experts.
        stale_experts: names such as layers.1 expert 3, or bank 0 expert 2.
        idle_experts: by layer, experts that no token of the last step was sent to.
        has_banks: whether layers combine banks.
        dead_banks: numbers of banks that no layer uses.
        coefficients: by layer, the weight of each bank, or the factor on its set, [2, P]; means over experts where each has its
            own.
        stale_coefficients: layers whose coefficients have had no gradient although they are to be trained.
    """

    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)
    evidence: Evidence | None = None
    stale_experts: list[str] = field(default_factory=list)
    idle_experts: dict[int, list[int]] = field(default_factory=dict)
    has_banks: bool = False
    dead_banks: list[int] = field(default_factory=list)
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    stale_coefficients: list[int] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong; an expert without work in one step is nothing wrong."""
        return not (self.not_finite or self.stale_experts or self.dead_banks or self.stale_coefficients)


def check_health(source: GlobalTensors, start: GlobalTensors | None = None, threshold: float = 1e-3) -> Health:
    """Returns what is wrong with a model.

    Args:
        start: the same run at an earlier step, best its first.
        threshold: share of a layer's largest coefficient below which a bank counts as dead there.

    Raises:
        CheckpointError: `start` is of another model.
    """
    health, config = Health(), source_config(source)
    for name in source.tensors:
        found = statistics(source.read(name))
        if not found.is_finite:
            health.not_finite[name] = (found.nan, found.inf)
    if config.moe.expert_layout == "dense":
        return health
    health.evidence, health.stale_experts = _stale_experts(source, start, config)
    places = moe_layers(config)
    if FRACTIONS in source.tensors:
        fractions_LE = source.read(FRACTIONS)
        if len(fractions_LE) != len(places):
            raise CheckpointError(f"There are loads of {len(fractions_LE)} MoE layers; config.yaml says {len(places)}.")
        for place, fractions_E in zip(places, fractions_LE, strict=True):
            if idle := (fractions_E[: place.num_experts] == 0).nonzero().flatten().tolist():
                health.idle_experts[place.index] = idle
    health.has_banks = config.moe.has_pool
    if config.moe.has_coefficients:
        _check_coefficients(health, source, config, threshold)
    return health


def _expert_tensors(source: GlobalTensors) -> Iterator[tuple[str, int, list[str]]]:
    """Yields each matrix of experts with its number of leading dims and the owners' names in order."""
    for name, stored in source.tensors.items():
        if name.startswith(SHARED) and name.endswith((".w1", ".w2")):
            kind, number, *_ = name.removeprefix(SHARED).split(".")
            banks = [f"{kind} {number}"] if number.isdigit() else [f"bank {b}" for b in range(stored.shape[0])]
            yield name, 2, [f"{bank} expert {e}" for bank in banks for e in range(stored.shape[1])]
        elif name.startswith("layers.") and name.endswith((".moe.experts.w1", ".moe.experts.w2")):
            yield name, 1, [f"layers.{name.split('.')[1]} expert {e}" for e in range(stored.shape[0])]


def _stale_experts(
    source: GlobalTensors, start: GlobalTensors | None, config: PretrainConfig
) -> tuple[Evidence, list[str]]:
    has_moments = any(name.startswith("optimizer.exp_avg_sq.") for name in source.tensors)
    evidence: Evidence = "start" if start is not None else "moments" if has_moments else "seed"
    initial = InitialValues(config, source) if evidence == "seed" else None
    stale: dict[str, bool] = {}
    for name, num_leading, owners in _expert_tensors(source):
        if evidence == "start":
            assert start is not None
            if name not in start.tensors or start.tensors[name].shape != source.tensors[name].shape:
                raise CheckpointError(f"The checkpoint to compare with has no {name} of the same shape.")
            still = _are_multiples(source.read(name), start.read(name), num_leading)
        elif evidence == "moments":
            kinds = ("exp_avg_sq", "momentum")  # AdamW's, Muon's
            moment = next((m for kind in kinds if (m := f"optimizer.{kind}.{name}") in source.tensors), None)
            if moment is None:  # frozen: it is to stay as it is
                continue
            still = [not row.any() for row in _rows(source.read(moment), num_leading)]
        else:
            assert initial is not None
            still = _are_multiples(source.read(name), initial.draw(name), num_leading)
        # An expert is stale only where all its matrices are.
        for owner, same in zip(owners, still, strict=True):
            stale[owner] = stale.get(owner, True) and same
    return evidence, [owner for owner, same in stale.items() if same]


def _are_multiples(now: Tensor, before: Tensor, num_leading: int) -> list[bool]:
    tolerance = max(ROUNDING.get(t.dtype, 0.0) for t in (now, before))
    rows = (_rows(t, num_leading) for t in (now, before))
    return [is_multiple(a, b, tolerance) for a, b in zip(*rows, strict=True)]


def _rows(t: Tensor, num_leading: int) -> Tensor:
    return t.flatten(0, num_leading - 1).flatten(1)


def is_multiple(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b times some factor from 0 to 1, up to a share of a's norm."""
    a, b = a.double(), b.double()
    square = float(b @ b)
    factor = float(a @ b) / square if square else 0.0
    return 0 <= factor <= 1 + tolerance and float((a - factor * b).norm()) <= tolerance * float(a.norm())


class InitialValues:
    """The values that a run's parameters began with, drawn again from its seed, one tensor at a time."""

    def __init__(self, config: PretrainConfig, source: GlobalTensors):
        native = NativeModel(config, int(source.train_state["vocab_size"]))
        self._seed, self._parameters, self.tensors = config.training.seed, native.parameters, native.tensors

    def draw(self, name: str) -> Tensor:
        """Returns a parameter's first value."""
        shape = self._parameters[name]
        parameter = nn.Parameter(torch.empty(shape.shape, dtype=shape.dtype), requires_grad=False)
        set_tag(parameter, tag_of(shape))
        initialize_parameters({name: parameter}, single_process_state(), self._seed)
        return parameter.data


def _check_coefficients(health: Health, source: GlobalTensors, config: PretrainConfig, threshold: float) -> None:
    experts = LayerExperts(source)
    used = torch.full((config.moe.num_expert_banks,), not config.moe.has_pool)
    for place in experts.layers:
        if not source_of(place).way.mixes:
            continue
        layer, name, a_2GP = place.index, f"layers.{place.index}.moe.combination", experts.coefficients(place)
        health.coefficients[layer] = a_2GP.mean(1)
        if source_of(place).way.combines:
            largest = a_2GP.abs().amax(-1, keepdim=True)
            used |= ((a_2GP.abs() >= threshold * largest) & (largest > 0)).flatten(0, 1).any(0)
        moment = f"optimizer.exp_avg_sq.{name}"
        if moment in source.tensors and not config.moe.samoe_freeze_coefficients and not source.read(moment).any():
            health.stale_coefficients.append(layer)
    health.dead_banks = (~used).nonzero().flatten().tolist()


def as_plain(health: Health) -> Mapping[str, Any]:
    """Returns the findings as values of JSON."""
    return {
        "sound": health.is_sound,
        "not_finite": {name: {"nan": nan, "inf": inf} for name, (nan, inf) in health.not_finite.items()},
        "evidence_of_updates": health.evidence,
        "never_updated_experts": health.stale_experts,
        "idle_experts_of_last_step": {str(layer): idle for layer, idle in health.idle_experts.items()},
        "dead_banks": health.dead_banks,
        "bank_weights": {str(layer): a_2P.tolist() for layer, a_2P in health.coefficients.items()},
        "layers_without_coefficient_gradient": health.stale_coefficients,
    }
