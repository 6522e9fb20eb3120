"""setup.py where a machine lacks something: the package still installs and a sentence names the way out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def tree(tmp_path):
    """A source tree with one trivial source file."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "cpp_ext" / "common").mkdir(parents=True)
    for path in (ROOT / "cpp_ext").glob("*.py"):
        shutil.copy(path, tmp_path / "cpp_ext")
    shutil.copy(ROOT / "cpp_ext" / "common" / "build_record.cpp", tmp_path / "cpp_ext" / "common")
    (tmp_path / "megatron_samoe" / "ops").mkdir(parents=True)
    shutil.copy(ROOT / "megatron_samoe" / "ops" / "schemas.txt", tmp_path / "megatron_samoe" / "ops")
    (tmp_path / "megatron_samoe" / "__init__.py").write_text('__version__ = "0"\n')
    return tmp_path


def _build(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *(words or ["--inplace"])],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _libraries(tree: Path) -> list[str]:
    return [path.name for path in (tree / "megatron_samoe").glob("*.so")]


def test_without_a_compiler(tree):
    (tree / "bin").mkdir()
    result = _build(tree, PATH=str(tree / "bin"), CXX="")
    assert result.returncode == 0, result.stderr
    assert "NOT built" in result.stderr and "apt-get install g++" in result.stderr
    assert not _libraries(tree)
    result = _build(tree, PATH=str(tree / "bin"), CXX="", MEGATRON_SAMOE_BUILD="cpu")
    assert result.returncode != 0 and "apt-get install g++" in result.stderr
    result = _build(tree, CXX="no-such-compiler")
    assert result.returncode == 0 and "CXX = 'no-such-compiler'" in result.stderr


def test_without_torch(tree):
    (tree / "hidden").mkdir()
    (tree / "hidden" / "torch.py").write_text("raise ImportError('hidden')\n")
    result = _build(tree, PYTHONPATH=str(tree / "hidden"))
    assert result.returncode == 0, result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr and not _libraries(tree)


def test_modes(tree):
    result = _build(tree, MEGATRON_SAMOE_BUILD="none")
    assert result.returncode == 0 and "is not built" in result.stdout and not _libraries(tree)
    result = _build(tree, MEGATRON_SAMOE_BUILD="gpu")
    assert result.returncode != 0 and "auto, cpu, cuda, none" in result.stderr


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.night
def test_builds_again_only_what_changed_and_removes_a_stale_library(tree):
    result = _build(tree)
    assert result.returncode == 0, result.stderr
    assert "1 of 1 compiled" in result.stdout and _libraries(tree) == ["_C.so"]
    source = tree / "cpp_ext" / "common" / "build_record.cpp"
    source.touch()  # a checkout's times say nothing
    assert "0 of 1 compiled" in _build(tree).stdout
    elsewhere = ["--build-lib", str(tree / "lib"), "--build-temp", str(tree / "temp")]  # as each of pip's builds
    assert "0 of 1 compiled" in _build(tree, *elsewhere).stdout and (tree / "lib/megatron_samoe/_C.so").exists()
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert "1 of 1 compiled" in _build(tree, CXX=f"{compiler} -DOTHER").stdout
    (tree / "hidden").mkdir()
    (tree / "hidden" / "torch.py").write_text("raise ImportError('hidden')\n")
    result = _build(tree, PYTHONPATH=str(tree / "hidden"))
    assert "stays as it was built" in result.stderr and _libraries(tree) == ["_C.so"]
    source.write_text(source.read_text() + "int broken(\n")
    result = _build(tree)
    assert result.returncode == 0 and "error" in result.stderr and not _libraries(tree)
