"""The site builds without a warning: every link leads somewhere, every page is in the contents."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the site is built with the extra [docs]")
ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    # Made pages go beside the sources, so these are copied; what pages link to lies where it lies in the repository.
    ignored = shutil.ignore_patterns("_build", "reference", ".*", "__pycache__", "*.so", "runs", "build")
    for name in ("docs", "examples", "megatron_samoe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-t", "pages", "-b", "html",
         str(tmp_path / "docs"), str(tmp_path / "html")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    index = (tmp_path / "html/index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"{page.stem}.html" in index, f"{page.name} is in no contents"
    options = (tmp_path / "html/reference/options.html").read_text()
    assert "--num-expert-banks" in options and "–num" not in options


@pytest.mark.night
def test_every_module_of_the_reference_can_be_imported() -> None:
    """Building their pages takes a minute; what stops it is a module that needs something that is not there."""
    code = "import importlib, runpy; [importlib.import_module(name) for name in runpy.run_path('docs/conf.py')['modules']()]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
