"""Former names of modules."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest

from tests.harness.tables import table

TABLE = table(__file__)


@pytest.mark.parametrize(("old", "new"), TABLE["modules"])
def test_a_former_name_gives_the_module_and_warns_of_the_new_one(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith(("megatron_samoe.interop", "megatron_samoe.compress"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(FutureWarning, match=rf"megatron_samoe\.{old} is now megatron_samoe\.{new};"):
        module = importlib.import_module(f"megatron_samoe.{old}")
    assert module is importlib.import_module(f"megatron_samoe.{new}")


def test_every_former_name_is_of_a_module_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_samoe import moved

    found: list[str] = []
    monkeypatch.setattr(moved, "modules_moved", lambda old, new_of: found.extend(new_of.values()) or [])
    for name in ("interop", "compress"):
        monkeypatch.delitem(sys.modules, f"megatron_samoe.{name}", raising=False)
        importlib.import_module(f"megatron_samoe.{name}")
        del sys.modules[f"megatron_samoe.{name}"]
    assert len(found) > 30
    for name in found:
        importlib.import_module(f"megatron_samoe.{name}")


@pytest.mark.parametrize(("module", "old", "new"), TABLE["names"])
def test_a_former_name_in_a_module_warns_of_the_new_one(module: str, old: str, new: str) -> None:
    module_now = importlib.import_module(f"megatron_samoe.{module}")
    with pytest.warns(FutureWarning, match=rf"megatron_samoe\.{module}\.{old} is now {new};"):
        assert getattr(module_now, old) is getattr(module_now, new)


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"megatron_samoe\.interop\.nothing"):
        importlib.import_module("megatron_samoe.interop.nothing")


def test_the_plug_in_of_an_older_installation_is_found() -> None:
    point = importlib.metadata.EntryPoint(
        "megatron_samoe", "megatron_samoe.interop.vllm:register", "vllm.general_plugins"
    )
    from megatron_samoe.plugins.vllm import register

    with pytest.warns(FutureWarning):
        sys.modules.pop("megatron_samoe.interop.vllm", None)
        assert point.load() is register
