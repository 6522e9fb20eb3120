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


def _copy_package(folder: Path, with_library: bool) -> Path:
    """A copy of the package, so that tests can damage its library."""
    ignore = None if with_library else shutil.ignore_patterns("*.so")
    shutil.copytree(PACKAGE, folder / "megatron_samoe", ignore=ignore)
    return folder


def test_off_uses_the_twins_silently():
    result = _run(ROUTE, MEGATRON_SAMOE_EXTENSION="off")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "available False False"


def test_a_missing_library_is_said_once_and_replaced(tmp_path):
    folder = _copy_package(tmp_path, with_library=False)
    result = _run(ROUTE, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The compiled extension is not used: it is not built.") == 1
    assert "take a wheel" in result.stdout and "available False False" in result.stdout
    result = _run(ROUTE, folder, MEGATRON_SAMOE_EXTENSION="require")
    assert result.returncode != 0 and "ExtensionError" in result.stderr and "it is not built" in result.stderr


@pytest.mark.night
def test_a_file_that_is_no_library_is_named(tmp_path):
    folder = _copy_package(tmp_path, with_library=False)
    (folder / "megatron_samoe" / "_C.so").write_bytes(b"not a library")
    result = _run(ROUTE, folder)
    assert result.returncode == 0, result.stderr
    assert "_C.so holds no build record" in result.stdout


@pytest.mark.night
def test_a_wrong_mode_is_refused():
    result = _run(ROUTE, MEGATRON_SAMOE_EXTENSION="requre")
    assert result.returncode != 0
    assert "ConfigError" in result.stderr and "Did you mean 'require'?" in result.stderr


needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


@needs_library
def test_a_library_for_later_releases_of_torch_is_not_loaded(tmp_path):
    folder = _copy_package(tmp_path, with_library=True)
    (library,) = (folder / "megatron_samoe").glob("_C*.so")
    content = library.read_bytes()
    oldest = b'"oldest_torch": "2.11"'
    assert oldest in content
    library.write_bytes(content.replace(oldest, b'"oldest_torch": "9.11"'))
    result = _run(ROUTE, folder)
    assert result.returncode == 0, result.stderr
    assert f"it takes torch 9.11 and later, and torch {torch.__version__} is running" in result.stdout
    assert "available False False" in result.stdout


@pytest.mark.night
@needs_library
def test_a_damaged_library_is_not_loaded(tmp_path):
    folder = _copy_package(tmp_path, with_library=True)
    (library,) = (folder / "megatron_samoe").glob("_C*.so")
    content = library.read_bytes()
    start = content.index(b"MEGATRON_SAMOE_BUILD_INFO=")
    library.write_bytes(content[start : start + 4096])
    result = _run(ROUTE, folder)
    assert result.returncode == 0, result.stderr
    assert "does not load" in result.stdout and "available False False" in result.stdout


@pytest.mark.night
@needs_library
def test_a_library_of_other_sources_is_not_used(tmp_path):
    """As after a `git pull` without a build: the library is of this torch and has the ops of another version."""
    folder = _copy_package(tmp_path, with_library=True)
    table, said = folder / "megatron_samoe" / "ops" / "schemas.txt", "it was built from other sources"
    table.write_text(table.read_text().replace("permute(Tensor x, ", "permute(Tensor y, "))
    result = _run(ROUTE, folder)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout and "take a wheel" in result.stdout
    assert "available False False" in result.stdout and "Traceback" not in result.stdout + result.stderr
    result = _run(ROUTE, folder, MEGATRON_SAMOE_EXTENSION="require")
    assert result.returncode != 0 and said in result.stderr


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


@needs_library
def test_fake_tensors_pass_through_the_ops():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ops = torch.ops.megatron_samoe
    with FakeTensorMode():
        logits_TE = torch.empty(10, 4)
        probs_TK, ids_TK, counts_GE, score_sum_GE, z_sum, logsumexp_T = ops.topk_gate(logits_TE, 2, False, True, 5)
        assert probs_TK.shape == ids_TK.shape == (10, 2) and ids_TK.dtype == counts_GE.dtype == torch.int64
        assert counts_GE.shape == score_sum_GE.shape == (5, 4) and z_sum.shape == () and logsumexp_T.shape == (10,)
        slot_of_row_N = torch.empty(20, dtype=torch.int64)
        rows_NH = ops.permute(torch.empty(10, 6, dtype=torch.bfloat16), slot_of_row_N, 2)
        assert rows_NH.shape == (20, 6) and rows_NH.dtype == torch.bfloat16
        assert ops.unpermute(rows_NH, probs_TK, ids_TK).shape == (10, 6)
        assert ops.combine_banks_backward(
            torch.empty(3, 2, 4), torch.empty(4, 2, 8), torch.empty(3, 2, 8), torch.empty(4, 2, 8)
        ).shape == (3, 2, 4)


def test_an_unknown_mode_raises_in_this_process_too(monkeypatch):
    monkeypatch.setenv(extension.ENVIRONMENT_VARIABLE, "always")
    with pytest.raises(ConfigError, match="auto, require, off"):
        extension.load.__wrapped__()
