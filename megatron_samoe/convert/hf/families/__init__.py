"""The families of classes that models are exported to and imported from, in the order of preference."""

from __future__ import annotations

from functools import cache

from megatron_samoe.config.entry_points import added
from megatron_samoe.convert.hf.families.base import Family
from megatron_samoe.convert.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_samoe.convert.hf.families.experts import GRANITE_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from megatron_samoe.convert.hf.families.gpt import GPT2, GPT_NEOX
from megatron_samoe.convert.hf.families.llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_samoe.convert.hf.families.samoe import SAMOE
from megatron_samoe.errors import ConfigError

#: Entry points of installed packages under this name are families, too.
GROUP = "megatron_samoe.hf_families"
_COMMON = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX, MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE)
_OURS = (*_COMMON, GRANITE, GRANITE_MOE, DEEPSEEK_V2, DEEPSEEK_V3)


@cache
def families() -> tuple[Family, ...]:
    """Returns our stock families, those of installed packages, and the class of our own, which computes most models.

    Raises:
        ConfigError: an installed package's entry point cannot be loaded, is not a Family, or its name is taken.
    """
    found = list(_OURS)
    for place, value, family in added(GROUP):
        if not isinstance(family, Family):
            raise ConfigError(place, value, f"must name a Family, not {type(family).__name__}")
        if family.name in (other.name for other in (*found, SAMOE)):
            raise ConfigError(place, family.name, "is the name of another family, too; rename or uninstall one")
        found.append(family)
    return (*found, SAMOE)


__all__ = ["GROUP", "SAMOE", "Family", "families"]
