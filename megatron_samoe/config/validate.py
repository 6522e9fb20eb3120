"""The check of a whole configuration, which reports all broken rules of `config/rules` at once.

`rules/layout.py` refuses layouts, and `rules/pipeline.py` those of pipeline stages. `model.py` refuses models,
`options.py` single options, and `run.py` anything else of a run.
"""

from __future__ import annotations

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rule, layout, model, options, pipeline, run
from megatron_samoe.config.rules.options import refuse_excess
from megatron_samoe.errors import ConfigError, ConfigErrors

RULES: tuple[Rule, ...] = (*options.RULES, *model.RULES, *layout.RULES, *pipeline.RULES, *run.RULES)


def validate(config: PretrainConfig, world_size: int) -> None:
    """Raises ConfigErrors naming every rule that the configuration breaks on `world_size` ranks."""
    refuse_excess(config)
    _raise_if_any([problem for rule in RULES for problem in rule(config, world_size)])


def refuse_wrong_numbers(config: PretrainConfig) -> None:
    """Raises ConfigErrors naming each number outside its own range, whatever the other options are."""
    refuse_excess(config)
    problems = [problem for rule in options.RANGES for problem in rule(config, 1)]
    moe = config.moe
    if moe.expert_layout != "dense" and moe.moe_router_topk > moe.fewest_experts:
        problems.append(
            ConfigError("--moe-router-topk", moe.moe_router_topk, f"must be at most --num-experts {moe.num_experts}")
        )
    _raise_if_any(problems)


def _raise_if_any(problems: list[ConfigError]) -> None:
    if problems:
        raise ConfigErrors(problems)
