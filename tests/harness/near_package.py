"""Packages of others beside this one, as pip would install them: one adds the way `near`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_samoe.config.sharing_map import ways

SITE = str(Path(__file__).parents[1] / "extending" / "site")


def install(folder: Path, group: str, name: str, value: str) -> Path:
    """Makes what pip leaves of an installed package that names an entry point."""
    info = folder / "outside-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return folder


@pytest.fixture(autouse=True)
def near_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs it for each test of a module that imports this."""
    monkeypatch.syspath_prepend(SITE)
    ways.cache_clear()
    yield
    ways.cache_clear()
