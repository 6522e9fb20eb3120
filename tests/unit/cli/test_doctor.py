"""The doctor: what it finds here, and what it calls a problem."""

from __future__ import annotations

import importlib.metadata
import re
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_samoe import installation
from megatron_samoe.cli import doctor
from megatron_samoe.cli.doctor import findings, main
from megatron_samoe.errors import DataError, optional_import
from megatron_samoe.ops import extension


def test_it_names_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "extra hf" in said and "GB are free" in said
    state = "ok" if extension.available() else "note"
    assert any(line.startswith(state) and "compiled extension" in line for line in said.splitlines())


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Takes the records of packages away that pip left, or of all."""
    found = importlib.metadata.version

    def version(package: str) -> str:
        if package in packages or not packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return found(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_missing_packages_come_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "transformers")
    found = {finding.what: finding for finding in findings()}
    assert found["extra hf"].state == "note" and "'.[hf]'" in found["extra hf"].text
    assert found["extra serve"].state == "ok"


def test_an_installation_without_sources_is_told_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch)
    monkeypatch.setattr(extension, "build_info", dict)
    monkeypatch.setattr(extension, "available", lambda: False)
    seen = {finding.what: finding.text for finding in findings()}
    assert "extra test" in seen and "`make install`" in seen["compiled extension"]
    assert all(str(installation.checkout()) in text for what, text in seen.items() if what.startswith("extra "))
    monkeypatch.setattr(installation, "checkout", lambda: None)
    seen = {finding.what: finding.text for finding in findings()}
    assert not {"extra test", "extra dev", "extra docs"} & seen.keys()
    assert re.search(r"transformers missing: pip install 'transformers\S+'$", seen["extra hf"])
    assert not [text for text in seen.values() if "-e ." in text or "in the repository" in text]
    with pytest.raises(DataError, match=r"needs the package nowhere: pip install 'pyarrow"):
        optional_import("nowhere", "data", "this")


def test_little_shared_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(64 << 20, 0, 64 << 20))
    assert main([]) == 1
    [found] = [f for f in findings(tmp_path / "nowhere") if f.what == "shared memory"]
    assert found.state == "note" and "gloo" in found.text
