"""Flags of other programs, and what they are here: for messages, and for the page on coming from Megatron-LM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from megatron_samoe.parsing import parse_yaml


@cache
def foreign_flags() -> Mapping[str, Mapping[str, str]]:
    """Returns flags with what is here in their place: `renamed` their names, `always_so` why they are not needed, `missing`
    what there is."""
    flags: Mapping[str, Mapping[str, str]] = parse_yaml(Path(__file__).with_suffix(".yaml").read_text())
    return flags


def what_it_is_here(name: str) -> str | None:
    """Returns what a flag of another program is here, for a message; None for one that is not known."""
    words = {
        "renamed": "is no option; this program's name for it is {}",
        "always_so": "is no option here; leave it out: {}",
        "missing": "is not there: {}",
    }
    found = (words[kind].format(flags[name]) for kind, flags in foreign_flags().items() if name in flags)
    return next(found, None)
