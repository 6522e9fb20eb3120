from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_samoe
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import extension, schemas
from tests.harness.pairs import first_by_day

PACKAGE = Path(megatron_samoe.__file__).parent
NOTHING_IS_LOADED = """
import torch, megatron_samoe.ops.topk_gate, megatron_samoe.ops.permute, megatron_samoe.ops.combine
from megatron_samoe.ops import extension
assert extension.load.cache_info().currsize == 0
assert not any("megatron_samoe" in path for path in torch.ops.loaded_libraries)
"""
ROUTE = """
import torch
from megatron_samoe.log import configure_logging
from megatron_samoe.ops import extension
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
configure_logging()
gate = topk_gate(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), 2)
permutation = make_permutation(gate.ids_TK, 4)
x = torch.randn(12, 8)
y = unpermute(permute(x, permutation), gate.probs_TK, permutation)
assert torch.allclose(x, y, atol=1e-5)
print("available", extension.available(), bool(extension.build_info().get("instruction_set")))
"""


def _run(code: str, package_parent: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            extension.ENVIRONMENT_VARIABLE: "auto",
            "PYTHONPATH": str(package_parent),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=package_parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_off_uses_the_twins_silently():
    result = _run(ROUTE, MEGATRON_SAMOE_EXTENSION="off")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "available False False"


@pytest.mark.parametrize("mode", ["always", "requre"])
def test_a_mode_that_does_not_exist_is_refused(mode, monkeypatch):
    monkeypatch.setenv(extension.ENVIRONMENT_VARIABLE, mode)
    with pytest.raises(ConfigError, match=r"auto, require, off" if mode == "always" else "Did you mean 'require'?"):
        extension.load.__wrapped__()


needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


def _take_a_later_torch(library: Path) -> None:
    content, oldest = library.read_bytes(), b'"oldest_torch": "2.11"'
    assert oldest in content
    library.write_bytes(content.replace(oldest, b'"oldest_torch": "9.11"'))


def _keep_only_the_record(library: Path) -> None:
    content = library.read_bytes()
    start = content.index(b"MEGATRON_SAMOE_BUILD_INFO=")
    library.write_bytes(content[start : start + 4096])


def _change_the_sources(library: Path) -> None:
    """As a `git pull` without a build does: the library is of this torch and has the ops of another version."""
    table = library.parent / "ops" / "schemas.txt"
    table.write_text(table.read_text().replace("permute(Tensor x, ", "permute(Tensor y, "))


UNUSABLE = {
    "missing": (Path.unlink, "it is not built"),
    "of a later torch": (
        _take_a_later_torch,
        f"it takes torch 9.11 and later, and torch {torch.__version__} is running",
    ),
    "of other sources": (_change_the_sources, "it was built from other sources"),
    "no library": (lambda library: library.write_bytes(b"not a library"), "_C.so holds no build record"),
    "cut": (_keep_only_the_record, "does not load"),
}


@needs_library
@pytest.mark.parametrize("name", first_by_day(UNUSABLE, 2))
def test_a_library_that_cannot_be_used_is_said_once_and_replaced(name, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "megatron_samoe")
    damage, said = UNUSABLE[name]
    (library,) = (tmp_path / "megatron_samoe").glob("_C*.so")
    damage(library)
    result = _run(ROUTE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The compiled extension is not used: ") == result.stdout.count(said) == 1
    assert "take a wheel" in result.stdout or name not in ("missing", "of other sources")
    assert "available False False" in result.stdout and "Traceback" not in result.stdout + result.stderr
    result = _run(ROUTE, tmp_path, MEGATRON_SAMOE_EXTENSION="require")
    assert result.returncode != 0 and "ExtensionError" in result.stderr and said in result.stderr


@needs_library
def test_the_table_of_schemas_is_the_librarys():
    assert extension.available()
    keys = ("CPU", "CompositeExplicitAutograd")
    names = [f"{schemas.NAMESPACE}::{name}" for name in schemas.SCHEMAS]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in names if not any(has_kernel(name, key) for key in keys)] == []
    without_schema = torch._C._dispatch_find_dangling_impls()
    assert [line for line in without_schema if schemas.NAMESPACE in line] == []


@needs_library
def test_build_info_tells_the_build_and_the_cpu():
    info = extension.build_info()
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert "portable" in info["instruction_sets"] and info["compiler"]


@needs_library
@pytest.mark.parametrize("instruction_set", first_by_day(["portable", "avx2", "avx512"]))
def test_every_instruction_set_routes_and_none_is_loaded_at_import(instruction_set):
    if instruction_set not in extension.build_info()["instruction_sets"]:
        pytest.skip(f"{instruction_set} is not in this build")
    code = NOTHING_IS_LOADED + ROUTE + "print(extension.build_info()['instruction_set'])"
    result = _run(code, MEGATRON_SAMOE_ISA=instruction_set)
    assert result.returncode == 0, result.stderr
    order = ["portable", "avx2", "avx512"]
    used = result.stdout.split()[-1]
    assert order.index(used) <= order.index(instruction_set)
