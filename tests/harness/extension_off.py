"""The package as it is where the compiled extension is not used: the user's own switch, and nothing of the decision replaced."""

from __future__ import annotations

import functools

import pytest

from megatron_samoe.ops import extension


def without_extension(patch: pytest.MonkeyPatch) -> None:
    """Turns the compiled extension off for as long as the patch holds."""
    patch.setenv("MEGATRON_SAMOE_EXTENSION", "off")
    # The same function, which has not been asked yet.
    patch.setattr(extension, "load", functools.cache(extension.load.__wrapped__))
