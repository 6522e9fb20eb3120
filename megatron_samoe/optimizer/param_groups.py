"""Groups of parameters with their own weight decay, learning rate and update, by pattern of the global name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from megatron_samoe.config.derived import flag, parse_multipliers
from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.optimizer.muon import muon_of
from megatron_samoe.optimizer.update import Update
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class ParamRule:
    """A rule for parameters whose global name matches: factors on weight decay and learning rate, and the update.

    All rules that match a name apply: their factors multiply, and the first update among them is the parameter's.

    Attributes:
        update: their update; None for that of another rule, or AdamW.
    """

    pattern: str
    weight_decay_mult: float = 1.0
    lr_mult: float = 1.0
    update: Update | None = None


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with the same weight decay, learning rate and update."""

    names: tuple[str, ...]
    weight_decay: float
    lr_mult: float
    update: Update | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether the parameters stay as they are; nothing is kept for their update, and no norm counts them."""
        return self.lr_mult == 0.0


#: Matrices of hidden layers, except the fused projection of queries, keys and values.
MATRICES = re.compile(r"\.(output|fc1|fc2|(q|kv)_(up|down))\.weight$|(\.moe\.experts|^expert_pool\..*)\.w[12]$")
FUSED_QKV = re.compile(r"\.qkv\.weight$")


def default_rules(config: OptimizerConfig) -> tuple[ParamRule, ...]:
    """Returns the rules of the configuration."""
    muon = (
        ParamRule(MATRICES.pattern, update=muon_of(config)),
        ParamRule(FUSED_QKV.pattern, update=muon_of(config, splits_qkv=True)),
    )
    return (
        *(muon if config.optimizer == "muon" else ()),
        ParamRule(r"\.moe\.combination$", weight_decay_mult=0.0, lr_mult=config.samoe_coefficient_lr_mult),
        ParamRule(r"\.moe\.router\.scale$", weight_decay_mult=0.0),
        ParamRule(r"\.moe\.router\.", lr_mult=config.moe_router_lr_mult),
        ParamRule(r"^expert_pool\.|\.moe\.experts\.", lr_mult=config.moe_expert_lr_mult),
        ParamRule(r"^expert_pool\.", lr_mult=config.samoe_bank_lr_mult),
        ParamRule(r"(^expert_pool\..*|\.moe\.experts)\.w2", lr_mult=config.moe_output_lr_mult),
        ParamRule(r"(\.|_)bias$|\.b[12]$|norm\.weight$|\.sinks$", weight_decay_mult=0.0),
        *(ParamRule(p, lr_mult=f) for p, f in parse_multipliers("lr_mult_patterns", config.lr_mult_patterns)),
        *(
            ParamRule(p, weight_decay_mult=f)
            for p, f in parse_multipliers("weight_decay_mult_patterns", config.weight_decay_mult_patterns)
        ),
    )


def build_param_groups(
    parameters: Iterable[str], config: OptimizerConfig, rules: tuple[ParamRule, ...] | None = None
) -> list[ParamGroup]:
    """Returns groups that together hold each global name once, in an order that does not follow from which names there are:
    ranks with other layers exchange what they share group by group.
    """
    rules = default_rules(config) if rules is None else rules
    members: dict[tuple[float, float, int], list[str]] = {}
    for name in parameters:
        found = [rule for rule in rules if re.search(rule.pattern, name)]
        decay = config.weight_decay * prod(rule.weight_decay_mult for rule in found)
        by = next((rules.index(rule) for rule in found if rule.update is not None), -1)
        members.setdefault((decay, prod(rule.lr_mult for rule in found), by), []).append(name)
    return [
        ParamGroup(tuple(names), decay, lr_mult, rules[by].update if by >= 0 else None)
        for (decay, lr_mult, by), names in sorted(members.items())
    ]


def refuse_idle_patterns(parameters: Iterable[str], config: OptimizerConfig, state: ParallelState) -> None:
    """Raises ConfigError naming a configured pattern that matches no parameter of any rank, or the patterns of rates if they
    leave nothing to train; ranks call it together.
    """
    given = [(f, text) for f in ("lr_mult_patterns", "weight_decay_mult_patterns") for text in getattr(config, f)]
    if not given:
        return
    names = sorted({name for held in state.world.all_gather_object(list(parameters)) for name in held})
    if all(group.is_frozen for group in build_param_groups(names, config)):
        raise ConfigError("--lr-mult-patterns", " ".join(config.lr_mult_patterns), "leave nothing to train")
    for field, text in given:
        ((pattern, _),) = parse_multipliers(field, (text,))
        if not any(re.search(pattern, name) for name in names):
            allowed = (
                f"matches no parameter that is trained; these are {', '.join(names[:3])} and {len(names) - 3} more"
            )
            raise ConfigError(flag(field), text, allowed)
