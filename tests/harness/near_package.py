"""The package of another that adds the way `near`, beside this one, as pip would install it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_samoe.config.sharing_map import ways

SITE = str(Path(__file__).parents[1] / "extending" / "site")


@pytest.fixture(autouse=True)
def near_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs it for each test of a module that imports this."""
    monkeypatch.syspath_prepend(SITE)
    ways.cache_clear()
    yield
    ways.cache_clear()
