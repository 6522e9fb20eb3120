"""The choice of a CPU's products: by what the system grants, as asked, or as the run so far."""

from __future__ import annotations

import ctypes

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.ops.cpu_products import Processor, choose
from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp

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
    for answer, granted in ((0, True), (-1, False)):
        asked = []

        class Libc:
            def __init__(self, name: None):
                pass

            def syscall(self, *numbers: int) -> int:
                asked.append(numbers)  # noqa: B023
                return answer  # noqa: B023

        monkeypatch.setattr(ctypes, "CDLL", Libc)
        monkeypatch.setattr(cpu_products.platform, "machine", lambda: "x86_64")
        found = cpu_products.this_processor.__wrapped__()
        assert ("amx_bf16" in found.features) == granted and found.vendor == "GenuineIntel"
        assert asked == [(158, 0x1023, 18)]


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
def test_a_bad_request_stops_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_products.VARIABLE, "fp8")
    with pytest.raises(ConfigError, match="one of auto"):
        cpu_products.use()


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
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
