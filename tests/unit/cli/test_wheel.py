"""The wheel: one for every Python and torch, which works where there is no compiler and no source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import pytest

from megatron_samoe.ops import extension

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


def run(*command: str, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copied_sources(tree: Path) -> Path:
    """Copies what a build takes, without what is built, and returns the folder."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "_build", "reference")
    for name in ("cpp_ext", "megatron_samoe", "examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm, which lists a library's symbols")
def test_the_library_uses_the_stable_abi_of_torch_alone() -> None:
    (library,) = (ROOT / "megatron_samoe").glob("_C*.so")
    undefined = run("nm", "--dynamic", "--undefined-only", str(library), cwd=ROOT).split()
    assert "aoti_torch_cpu_mm_out" in undefined
    assert not [name for name in undefined if re.match(r"_Z\w*(2at|3c10|5torch)\w", name)]


@pytest.mark.night
def test_a_wheel_works_without_sources_and_compiler(tmp_path: Path) -> None:
    tree, wheels, installed = copied_sources(tmp_path / "tree"), tmp_path / "wheels", tmp_path / "installed"
    pip, quiet = (sys.executable, "-m", "pip"), ("--quiet", "--no-index", "--no-deps")
    build = (*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(wheels), str(tree))
    run(*build, cwd=tmp_path, MEGATRON_SAMOE_BUILD="cpu")
    (wheel,) = wheels.iterdir()
    assert re.fullmatch(r"megatron_samoe-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    run(*pip, "install", *quiet, "--target", str(installed), str(wheel), cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    there = partial(run, cwd=tmp_path / "empty", PYTHONPATH=str(installed))
    program = (sys.executable, "-m", "megatron_samoe")
    said = there(*program, "doctor", PATH=str(tmp_path / "empty"))
    assert re.search(r"ok +compiled extension +_C.so", said), said
    code = "import megatron_samoe, megatron_samoe.cli.quickstart as q; print(megatron_samoe.__file__)"
    assert str(installed) in there(sys.executable, "-c", code)
    for part in "cli/quickstart_data/config.yaml cli/init_data/shown.yaml py.typed inference/server/page.html".split():
        assert (installed / "megatron_samoe" / part).exists()
    benchmark = there("sh", "-c", f"{' '.join(program)} benchmark moe-layer 2>&1; echo $?")
    assert benchmark.endswith("\n2\n") and "in a checkout of the repository (tools/benchmarks)" in benchmark
    there(*program, "init", "new", "--example", "shared_pool")
    study = "configs/study.yaml"
    assert (tmp_path / "empty/new" / study).read_bytes() == (ROOT / "examples" / study).read_bytes()


@pytest.mark.night
def test_pip_installs_the_sources_into_a_fresh_environment(tmp_path: Path) -> None:
    """As a stranger does, without another word: pip brings torch to the build, and the extension is there and used."""
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh" / "bin" / "python")
    tree = copied_sources(tmp_path / "tree")
    done = subprocess.run([python, "-m", "pip", "install", str(tree)], capture_output=True, text=True, timeout=1800)
    if "No matching distribution" in done.stderr or "Connection" in done.stderr:
        pytest.skip(f"pip reaches no registry: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    said = run(python, "-m", "megatron_samoe", "doctor", cwd=tmp_path)
    assert re.search(r"ok +compiled extension +_C.so", said), said
