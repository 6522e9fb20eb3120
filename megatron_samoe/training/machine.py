"""The facts of a host: for whoever reads a run's speed later, and for the error that names a host that differs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import megatron_samoe
from megatron_samoe.config.option import flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.bin_readers import is_remote
from megatron_samoe.datasets.build import splits_of
from megatron_samoe.errors import DataError
from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.parallel_state.state import ParallelState

#: Environment variables that force one of several ways to the same sums, which differ by rounding.
PATHS = (
    "MEGATRON_SAMOE_EXTENSION",
    "MEGATRON_SAMOE_ISA",
    "MEGATRON_SAMOE_BF16_PRODUCTS",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
)
#: Of a data file this many blocks are compared, at equal distances from the first byte to the last: what differs in a longer
#: stretch than is between two of them is noticed.
_COMPARED_BLOCKS, _COMPARED_BYTES = 256, 1 << 16
#: Options that a host may have of its own. Threads are compared as they come out.
_OF_A_HOST = ("data_cache_path", "num_threads")


def machine_facts(parallel: ParallelState) -> dict[str, Any]:
    """Returns device, ranks and software, as plain values; the host's name is not among them."""
    device, grid = parallel.device, parallel.grid
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "device_name": name,
        "cores": num_cores(),
        "threads_per_rank": torch.get_num_threads(),
        "ranks": grid.world_size,
        "layout": {
            "tensor": grid.tp,
            "context": grid.cp,
            "pipeline": grid.pp,
            "expert": grid.ep,
            "expert_tensor": grid.etp,
            "data": grid.dp,
        },
        "torch": torch.__version__,
        "extension": extension.available(),
        "cuda_kernels": extension.cuda_kernels_in_use(),
        "bf16_products": None if (row := cpu_products.in_use()) is None else row.bf16,
        "forced": {name: os.environ[name] for name in PATHS if name in os.environ},
    }


def num_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Returns the name of the processor, or of its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def alike_facts(config: PretrainConfig, device: torch.device) -> dict[str, str]:
    """Returns versions, builds, options and data of this host, and what it computes with."""
    facts = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "megatron_samoe": f"{megatron_samoe.__version__}, files {_digest_of_package()}",
        "compiled extension": "not in use",
        **{name: os.environ[name] for name in PATHS if name in os.environ},
        **{
            flag(name): str(value)
            for options in asdict(config).values()
            for name, value in options.items()
            if name not in _OF_A_HOST
        },
        **dict(_data_files(config)),
    }
    if extension.available():
        facts["compiled extension"] = extension.build_identity()["a compiled extension"]
        facts["instruction set (MEGATRON_SAMOE_ISA)"] = extension.build_info()["instruction_set"]
    if device.type == "cpu":
        facts["instruction set of torch (ATEN_CPU_CAPABILITY)"] = torch.backends.cpu.get_cpu_capability()
        facts["threads of a rank (--num-threads, else by cores)"] = str(torch.get_num_threads())
    return facts


def _digest_of_package() -> str:
    root, digest = Path(megatron_samoe.__file__).parent, hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _data_files(config: PretrainConfig) -> Iterator[tuple[str, str]]:
    """Yields each file of data that is read from a disk, with its size and a digest of blocks all through it; and the
    checksum that whoever wrote the data noted of all of it."""
    try:
        prefixes = sorted({prefix for split in splits_of(config.data) for prefix in split.blend.prefixes})
    except DataError:  # which is reported where data are built
        return
    for prefix in (prefix for prefix in prefixes if not is_remote(prefix)):
        for path in (f"{prefix}.bin", f"{prefix}.idx"):
            try:
                yield path, _sampled(path)
            except OSError as error:
                yield path, f"{error.strerror}"
        with contextlib.suppress(DataError):  # as above
            if (noted := manifest.read(prefix)) is not None:
                yield manifest.get_manifest_path(prefix), f"{noted.num_tokens:,} tokens, CRC-32 {noted.bin_crc32:08x}"


def _sampled(path: str) -> str:
    """Returns a file's size and a digest of its sampled blocks."""
    digest = hashlib.blake2b(digest_size=6)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(0, size - _COMPARED_BYTES)
        step = max(1, -(-last // (_COMPARED_BLOCKS - 1)))
        for start in (*range(0, last, step), last):
            file.seek(start)
            digest.update(file.read(_COMPARED_BYTES))
    return f"{size:,} bytes, {digest.hexdigest()}"
