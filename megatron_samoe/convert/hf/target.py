"""Which class a native model is exported to, and why: rules only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_samoe.config.sharing_map import OWN, ExpertSource
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.convert.edited_model import with_sharing
from megatron_samoe.convert.hf.families import SAMOE, Family, families
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError, nearest


def targets() -> tuple[str, ...]:
    """Returns what --hf-model-type may be."""
    return ("auto", *(family.name for family in families()))


@dataclass(frozen=True)
class Target:
    """The class that an export is for.

    Attributes:
        fold: whether what layers share is folded into each layer's own experts first.
        why: lines that give the reasons.
    """

    family: Family
    fold: bool
    why: tuple[str, ...]


def choose_target(native: NativeModel, wanted: str = "auto", fold: bool = False) -> Target:
    """Returns the target of an export.

    Args:
        wanted: auto, or a family's name. auto takes the first stock class that computes the same function, or our own;
            what layers share is kept, unless `fold` is given.
        fold: give each layer its own experts, whatever the target; naming a stock class implies it.

    Raises:
        ConfigError: the family is not known or cannot compute the model, or there is nothing to fold.
    """
    if wanted not in targets():
        raise ConfigError(
            "--hf-model-type", wanted, f"must be one of {', '.join(targets())}." + nearest(wanted, targets())
        )
    refuse_unknown(native.config, "export", "Hugging Face's classes")
    shares = native.moe.shares_experts
    if fold and not shares:
        raise ConfigError(
            "--fold",
            True,
            "needs a model whose layers share experts, not --expert-layout "
            f"{native.moe.expert_layout} with --expert-sharing {native.moe.sharing}",
        )
    if wanted == SAMOE.name or (wanted == "auto" and shares and not fold):
        return Target(SAMOE, fold, (_own_class(shares and not fold),))
    fold, folded = shares, folded_model(native) if shares else native
    if wanted != "auto":
        family = next(family for family in families() if family.name == wanted)
        if misfits := family.misfits(folded):
            others = [f.name for f in families() if not f.misfits(folded)]
            raise ConfigError(
                "--hf-model-type",
                wanted,
                f"{family.architecture} does not compute {'; nor '.join(misfits)}. "
                f"These classes do: {', '.join(others)}",
            )
        return Target(family, fold, (f"{wanted} was asked for, and computes the same function", *_folding(fold)))
    why = list(_folding(fold))
    *stock, own = families()
    for family in stock:
        misfits = family.misfits(folded)
        if not misfits:
            return Target(family, fold, (*why, f"{family.name} computes the same function"))
        if misfits[0].startswith("--expert-layout"):
            continue  # dense classes for a model with experts, and the other way round, need no reason
        why.append(f"not {family.name}: {misfits[0]}{f' (and {len(misfits) - 1} more)' if misfits[1:] else ''}")
    return Target(own, fold, (*why, _own_class(False)))


def folded_model(native: NativeModel) -> NativeModel:
    """Returns what a model is when every layer has its own experts."""
    return replace(native, config=with_sharing(native.config, [ExpertSource(OWN)] * len(native.sources)))


def _folding(fold: bool) -> tuple[str, ...]:
    return ("what layers share is folded into each layer's own experts",) if fold else ()


def _own_class(keeps_pool: bool) -> str:
    kept = "keeps what layers share and its saving (--fold gives each layer its own experts)"
    return f"our own class, to be loaded with trust_remote_code=True, {kept if keeps_pool else 'computes it'}"
