"""Groups of parameters with their own weight decay, learning rate and update, by pattern of the global name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.optimizer.update import Update


@dataclass(frozen=True)
class ParamRule:
    """A rule for parameters whose global name matches: factors on weight decay and learning rate, and the update.

    Attributes:
        update: their update; None for AdamW.
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


def default_rules(config: OptimizerConfig) -> tuple[ParamRule, ...]:
    """Returns the rules of the configuration; the first rule that matches a name applies."""
    return (
        ParamRule(r"\.moe\.combination$", weight_decay_mult=0.0, lr_mult=config.samoe_coefficient_lr_mult),
        ParamRule(r"\.moe\.router\.scale$", weight_decay_mult=0.0, lr_mult=config.moe_router_lr_mult),
        ParamRule(r"\.moe\.router\.", lr_mult=config.moe_router_lr_mult),
        ParamRule(r"^expert_pool\..*\.b[12]$", weight_decay_mult=0.0, lr_mult=config.samoe_bank_lr_mult),
        ParamRule(r"^expert_pool\..*\.w2", lr_mult=config.samoe_bank_lr_mult * config.moe_output_lr_mult),
        ParamRule(r"^expert_pool\.", lr_mult=config.samoe_bank_lr_mult),
        ParamRule(r"\.moe\.experts\.w2$", lr_mult=config.moe_output_lr_mult),
        ParamRule(r"(\.|_)bias$|\.b[12]$|norm\.weight$", weight_decay_mult=0.0),
        ParamRule(r""),
    )


def build_param_groups(
    parameters: Iterable[str], config: OptimizerConfig, rules: tuple[ParamRule, ...] | None = None
) -> list[ParamGroup]:
    """Returns groups that together hold each global name once; groups without members are left out."""
    rules = default_rules(config) if rules is None else rules
    members: dict[ParamRule, list[str]] = {rule: [] for rule in rules}
    for name in parameters:
        rule = next((r for r in rules if re.search(r.pattern, name)), None)
        assert rule is not None, f"no rule for parameter {name}"
        members[rule].append(name)
    return [
        ParamGroup(tuple(names), config.weight_decay * rule.weight_decay_mult, rule.lr_mult, rule.update)
        for rule, names in members.items()
        if names
    ]
