"""The compiled extension: what is said where it cannot be used, and the choice of a CPU's products."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import megatron_samoe
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import cpu_products, extension, schemas
from megatron_samoe.ops.cpu_products import Processor, choose
from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp
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
    usual = {extension.ENVIRONMENT_VARIABLE: "auto", "PYTHONPATH": str(package_parent), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **usual, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=package_parent, capture_output=True, text=True, timeout=120)


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


AVX512 = {"avx2", "avx512f"}
XEON = Processor("GenuineIntel", frozenset({*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"}))
XEON_WITHOUT_TILES = Processor("GenuineIntel", frozenset({*AVX512, "avx512_bf16"}))
ZEN4 = Processor("AuthenticAMD", frozenset({*AVX512, "avx512_bf16"}))
ZEN3 = Processor("AuthenticAMD", frozenset({"avx2"}))
UNKNOWN = Processor("", frozenset())


def test_the_table_goes_by_features() -> None:
    ways = [choose(p, "avx512_bf16" in p.features, None).bf16 for p in (XEON, XEON_WITHOUT_TILES, ZEN4, ZEN3)]
    assert ways == ["amx", "fp32", "native", "fp32"]
    assert choose(XEON, True, None).fp32_tokens < 512 < choose(ZEN4, True, None).fp32_tokens
    assert choose(UNKNOWN, False, None).bf16 in ("blas", "fp32")
    # Held to an older instruction set, a processor has not our kernel.
    assert choose(ZEN4, False, None).bf16 == "fp32"


@pytest.mark.parametrize(
    ("asked", "processor", "words"),
    [
        ("amx", ZEN4, "grants no matrix tiles.*has native, blas, fp32"),
        ("amx", XEON_WITHOUT_TILES, "grants no matrix tiles"),
        ("native", ZEN3, "AVX-512 with bf16 here. This machine has blas, fp32"),
        ("fp8", XEON, "one of auto, native, amx, blas, fp32"),
    ],
)
def test_a_way_that_the_machine_lacks_is_an_error(asked: str, processor: Processor, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(processor, "avx512_bf16" in processor.features, asked)


def test_what_was_asked_for_goes_before_the_run_so_far() -> None:
    assert choose(XEON, True, "native", "blas").bf16 == "native"
    assert choose(XEON, True, "auto", "blas").bf16 == "blas"
    assert choose(ZEN4, True, None, "amx").bf16 == "native"
    assert choose(ZEN4, True, None, "fp32").bf16 == "fp32"


def test_tiles_count_only_where_the_kernel_grants_them(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "cpuinfo"
    file.write_text("vendor_id\t: GenuineIntel\nflags\t\t: avx512f amx_tile amx_bf16 amx_int8\n")
    monkeypatch.setattr(cpu_products, "CPU_INFO", file)
    monkeypatch.setattr(cpu_products.platform, "machine", lambda: "x86_64")
    libc = Mock()
    monkeypatch.setattr(ctypes, "CDLL", libc)
    for answer, granted in ((0, True), (-1, False)):
        libc.return_value.syscall.return_value = answer
        found = cpu_products.this_processor.__wrapped__()
        assert ("amx_bf16" in found.features) == granted and found.vendor == "GenuineIntel"
        libc.return_value.syscall.assert_called_with(158, 0x1023, 18)


@needs_library
def test_a_bad_request_stops_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_products.VARIABLE, "fp8")
    with pytest.raises(ConfigError, match="one of auto"):
        cpu_products.use()


@needs_library
def test_the_blas_pads_rows_and_leaves_their_neighbours_alone() -> None:
    """Rows that are no multiple of the padding, of experts that lie side by side: as one expert after the other."""
    generator = torch.Generator().manual_seed(1)
    rows = [33, 1, 0, 520, 64]
    x = torch.randn(sum(rows), 24, generator=generator).bfloat16()
    w1, w2 = (torch.randn(5, *s, generator=generator).bfloat16() / 4 for s in ((40, 24), (24, 40)))
    with cpu_products.using(bf16="blas"):
        together = grouped_mlp(x, rows, ExpertWeights(w1, w2), "gelu")
        alone = [
            grouped_mlp(x_n, [n], ExpertWeights(w1[e : e + 1], w2[e : e + 1]), "gelu")
            for e, (n, x_n) in enumerate(zip(rows, x.split(rows), strict=True))
        ]
    assert torch.equal(together, torch.cat(alone))
