"""How a CPU makes matrix products, by what its processor has and the system grants.

Experts in bf16 are multiplied by our kernel (`native`, AVX-512's dot products), by torch's BLAS (`blas`; on matrix tiles
`amx`), or in fp32 from widened operands (`fp32`). Weight gradients are summed in fp32 in every way. Inference streams
weights through its own kernels, with activations in fp32, while tokens are few. From the number in the table on it makes
full products; those of weights in bf16 go the way of experts, and so round activations as training does, except for `fp32`.

The choice comes from the table, never from a timing. MEGATRON_SAMOE_BF16_PRODUCTS asks for a way of bf16, and a run keeps on
resume what its checkpoint says where the machine can.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from megatron_samoe.errors import ConfigError, nearest
from megatron_samoe.log import say_once
from megatron_samoe.ops.process_choice import ProcessChoice

Bf16Products = Literal["native", "amx", "blas", "fp32"]
VARIABLE = "MEGATRON_SAMOE_BF16_PRODUCTS"
CPU_INFO = Path("/proc/cpuinfo")
_NEVER = 2**62


@dataclass(frozen=True)
class Processor:
    """A vendor and the features that programs may use, as Linux names them in /proc/cpuinfo."""

    vendor: str
    features: frozenset[str]


class ProductChoice(NamedTuple):
    """Ways for processors of a vendor (any if empty) with some features.

    Attributes:
        fp32_tokens, bf16_tokens: tokens from which inference makes full products with weights of the type.
    """

    vendor: str
    features: frozenset[str]
    bf16: Bf16Products
    fp32_tokens: int
    bf16_tokens: int


#: The first row that fits counts. Above each is what it rests on.
TABLE = (
    # Xeon with AMX: experts whose counts change 24 ms by tiles with padded counts, 65 native, 53 fp32; a layer of 2048 x 2048
    # over 512 tokens streamed 47 ms in fp32 and 44 in bf16, by the BLAS 28 and 6. The bounds of tokens are estimates from these.
    ProductChoice("", frozenset({"amx_tile", "amx_bf16"}), "amx", 64, 64),
    # bf16 dot products have half the rate of fp32's multiply-adds; tokens are estimates, too.
    ProductChoice("GenuineIntel", frozenset({"avx512f"}), "fp32", 64, 128),
    # Zen 4: native 0.91 to 0.98 of bare products that torch makes code for; streamed layers of 2048 x 2048 over 32 to 256
    # tokens have 1.2 to 1.5 times the speed of torch's product in fp32. Rounded, layers of 512 to 4,096 have 1.7 to 2.1 times
    # the speed of streamed ones over 64 to 512 tokens (1.2 to 1.6 over 16).
    ProductChoice("AuthenticAMD", frozenset({"avx512_bf16"}), "native", _NEVER, 64),
    # Zen 4 held to AVX2: streamed layers 1.0 to 1.4 times the speed of torch's product to 128 tokens, 0.94 at 256.
    ProductChoice("AuthenticAMD", frozenset({"avx2"}), "fp32", _NEVER, _NEVER),
    # Not measured.
    ProductChoice("", frozenset(), "fp32" if platform.machine() in ("x86_64", "AMD64") else "blas", _NEVER, _NEVER),
)


@functools.cache
def this_processor() -> Processor:
    """Returns the processor under this process. Matrix tiles count only where the kernel grants them to it."""
    try:
        lines = [line.split(":", 1) for line in CPU_INFO.read_text().splitlines() if ":" in line]
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, value in reversed(lines)}
    features = frozenset(facts.get("flags", facts.get("Features", "")).split())
    if "amx_tile" in features and not _tiles_are_granted():
        features = frozenset(name for name in features if not name.startswith("amx"))
    return Processor(facts.get("vendor_id", ""), features)


def _tiles_are_granted() -> bool:
    """Asks Linux for the state of tiles, which a process has only after it asked (arch_prctl, ARCH_REQ_XCOMP_PERM)."""
    if platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def row_for(processor: Processor) -> ProductChoice:
    """Returns the table's row for a processor."""
    return next(row for row in TABLE if row.vendor in ("", processor.vendor) and row.features <= processor.features)


def possible(processor: Processor, has_kernel: bool) -> list[Bf16Products]:
    """Returns the ways of bf16 that a processor has.

    Args:
        has_kernel: whether our kernel runs on it.
    """
    has = {"native": has_kernel, "amx": {"amx_tile", "amx_bf16"} <= processor.features}
    return [way for way in get_args(Bf16Products) if has.get(way, True)]


def choose(processor: Processor, has_kernel: bool, asked: str | None, recorded: str | None = None) -> ProductChoice:
    """Returns the row to use, with the way of bf16 that was asked for, else that of the run so far, else the table's.

    Raises:
        ConfigError: the asked way is unknown, or the machine lacks it.
    """
    row, ways = row_for(processor), possible(processor, has_kernel)
    if asked not in (None, "auto"):
        known = ("auto", *get_args(Bf16Products))
        if asked not in known:
            raise ConfigError(VARIABLE, asked, f"one of {', '.join(known)}.{nearest(asked, known)}")
        if asked not in ways:
            lacks = (
                "the system grants no matrix tiles (amx_tile, amx_bf16)"
                if asked == "amx"
                else "it takes AVX-512 with bf16"
            )
            raise ConfigError(VARIABLE, asked, f"{lacks} here. This machine has {', '.join(ways)}")
        return row._replace(bf16=asked)
    if recorded in ways:
        return row._replace(bf16=recorded)
    if recorded is not None:
        say_once(
            f"This run multiplied experts in bf16 by {recorded}, which this machine lacks: from here on it rounds otherwise."
        )
    return row if row.bf16 in ways else row._replace(bf16="fp32")


_chosen: ProcessChoice[ProductChoice | None] = ProcessChoice(None)


def use(recorded: str | None = None) -> ProductChoice:
    """Chooses for this process, and returns what was chosen; the extension has been loaded.

    Args:
        recorded: the way of bf16 that the run has used so far, if any.

    Raises:
        ConfigError: as `choose`.
    """
    has_kernel = torch.ops.megatron_samoe.has_bf16_product()
    return _take(choose(this_processor(), has_kernel, os.environ.get(VARIABLE), recorded))


def _take(row: ProductChoice) -> ProductChoice:
    torch.ops.megatron_samoe.set_products("blas" if row.bf16 == "amx" else row.bf16, row.fp32_tokens, row.bf16_tokens)
    _chosen.value = row
    return row


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[None]:
    """Inside, fields of the row in use are others."""
    before = _chosen.value
    assert before is not None
    _take(before._replace(**changes))
    try:
        yield
    finally:
        _take(before)


def in_use() -> ProductChoice | None:
    """Returns what this process uses; None without the extension."""
    return _chosen.value


def product_tokens(dtype: torch.dtype) -> int:
    """Returns the tokens from which inference makes full products with weights of a type."""
    chosen = _chosen.value
    if chosen is None or dtype == torch.int8:
        return _NEVER
    return chosen.fp32_tokens if dtype == torch.float32 else chosen.bf16_tokens
