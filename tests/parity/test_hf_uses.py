"""Uses of an exported class in transformers, as `class_uses` lists them: by day with the installed version, at night with the
oldest and the newest that this package supports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.tables import table
from tests.parity import class_uses
from tests.parity.hf_models import sent

pytestmark = pytest.mark.parity

TABLE = table(__file__)
#: Stock classes, which say what a version of transformers can do; models of our class, each with one of these.
STOCK: dict[str, dict[str, Any]] = TABLE["stock"]
MODELS: dict[str, tuple[str, dict[str, Any], str]] = TABLE["models"]
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def export(root: Path, name: str) -> Path:
    """Returns the folder of a model, exported with its own class or a stock one."""
    layout, options, _ = MODELS.get(name, ("dense", {"style": "llama", **STOCK.get(name, {})}, ""))
    words = ("--hf-model-type", "samoe") if name in MODELS else ()
    return sent(root / name, layout, options, *words)[1]


def test_uses_with_the_installed_version(tmp_path: Path) -> None:
    """A model with most of what can go wrong: windows in some layers, a pool, biases of routers."""
    folders = [str(export(tmp_path, name)) for name in ("some_windows", "stock_window")]
    assert not list(class_uses.faults(*folders))


@pytest.mark.night
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_uses_with_every_supported_version(which: str, tmp_path: Path) -> None:
    oldest = re.search(r"transformers>=([\d.]+)", PYPROJECT.read_text())
    assert oldest is not None
    wanted = f"transformers=={oldest[1]}.*" if which == "oldest" else "transformers"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "site")]
    for words in ([wanted], ["--no-deps", "accelerate"]):
        done = subprocess.run([*install, *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {words[-1]}: {done.stderr.strip().splitlines()[-1]}")
    folders = {name: str(export(tmp_path, name)) for name in (*MODELS, *STOCK)}
    paths = [folders[name] for model, (*_, stock) in MODELS.items() for name in (model, stock)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, class_uses.__file__, *paths], capture_output=True, text=True, env=environment
    )
    print(done.stdout)
    assert done.returncode == 0 and "on_disk" not in done.stdout, done.stdout + done.stderr[-2000:]
    if which == "oldest":
        assert f"transformers {oldest[1]}." in done.stdout
