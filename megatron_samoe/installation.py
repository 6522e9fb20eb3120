"""Where the package is, and how what it lacks is installed there."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from pathlib import Path

#: What only work on the package needs.
CHECKOUT_EXTRAS = ("test", "docs", "dev")


def checkout() -> Path | None:
    """Returns the folder of the sources that the package runs from; None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "setup.py").exists() else None


def extras() -> dict[str, list[str]]:
    """Returns the packages of each extra that an installation of this kind can use, as pip takes them."""
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("megatron_samoe") or ():
        match = re.match(r"""([^;]*?)\s*;.*extra == ['"]([\w-]+)['"]""", line)
        if match is None or re.match(r"megatron[-_]samoe\b", match[1]):
            continue
        if checkout() is not None or match[2] not in CHECKOUT_EXTRAS:
            found.setdefault(match[2], []).append(match[1])
    return found


def install_extra(extra: str) -> str:
    """Returns how an extra is installed: no registry holds the package, so one from a wheel names the extra's packages."""
    if checkout() is not None:
        return f"in {checkout()}, pip install --no-build-isolation -e '.[{extra}]'"
    return f"pip install {shlex.join(extras().get(extra, ()))}"


def how_to_build() -> str:
    """Returns, as a sentence, how the compiled extension is built."""
    if checkout() is None:
        return "This installation has no sources: take a wheel that `make wheels` made in a checkout, on a machine with g++."
    return f"In {checkout()}, `make install` (or `pip install --no-build-isolation -e .`) builds it, with a C++ compiler (g++)."
