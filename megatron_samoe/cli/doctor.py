"""Says what this installation can do here, what is missing, and how to get it: `megatron-samoe doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_samoe import __version__
from megatron_samoe.cli.program import program
from megatron_samoe.errors import in_units
from megatron_samoe.installation import extras, how_to_build, install_extra
from megatron_samoe.ops import extension
from megatron_samoe.runtime.free_memory import free_memory_bytes
from megatron_samoe.training.machine import cpu_name, num_cores

#: What ranks of a host that exchange tokens through shared memory should find there at least.
LEAST_SHARED_BYTES = 1 << 30
#: Files that a rank with many datasets, pipes and connections has open.
LEAST_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: ok, note (something is slower or missing, nothing is wrong) or problem.
    """

    state: str
    what: str
    text: str


def findings(shared_memory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Yields what was found, most important first."""
    yield Finding(
        "ok", "megatron_samoe", f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    yield _extension()
    yield from _devices()
    yield Finding("ok", "memory", f"{in_units(free_memory_bytes(torch.device('cpu')), 'B')} are free")
    yield _shared_memory(shared_memory)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < LEAST_FILES
    yield Finding(
        "note" if few else "ok", "open files", f"{soft} allowed" + ("; ulimit -n 4096 allows more" if few else "")
    )
    yield from _extras()


def _extension() -> Finding:
    info = extension.build_info()
    if not extension.available():
        slower = "a slower reference in plain torch does the work of each op"
        why = f"{slower}; the line above says why" if info else f"it is not built, and {slower}. {how_to_build()}"
        return Finding("note", "compiled extension", why)
    cuda = "with CUDA kernels" if extension.has_cuda_kernels() else "without CUDA kernels"
    return Finding("ok", "compiled extension", f"{info['library']}, {cuda}; CPU kernels for {info['instruction_set']}")


def _devices() -> Iterator[Finding]:
    yield Finding("ok", "CPU", f"{cpu_name()}, {num_cores()} cores for this process, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        build = (
            f"this torch is built for CUDA {torch.version.cuda}, and no GPU is seen"
            if torch.version.cuda
            else ("this torch is built for CPUs only")
        )
        yield Finding("note", "GPU", build)
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield Finding(
            "ok", f"GPU {number}", f"{facts.name}, {in_units(facts.total_memory, 'B')}, sm_{facts.major}{facts.minor}"
        )
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding("ok", "NCCL", version)


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding(
            "note", "shared memory", f"{folder} is not there; ranks of a host exchange over gloo, which is slower"
        )
    free = shutil.disk_usage(folder).free
    if free >= LEAST_SHARED_BYTES:
        return Finding("ok", "shared memory", f"{in_units(free, 'B')} in {folder}")
    return Finding(
        "problem",
        "shared memory",
        f"{folder} has {in_units(free, 'B')}, too little for ranks of one host that exchange large batches; a container gets more "
        "by --shm-size 8g",
    )


def _extras() -> Iterator[Finding]:
    """Yields what optional packages are for, by the extras of this package."""
    for extra, requirements in extras().items():
        packages = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]  # type: ignore[index]
        missing = [package for package in packages if not _is_installed(package)]
        if not missing:
            yield Finding("ok", f"extra {extra}", ", ".join(packages))
        else:
            yield Finding("note", f"extra {extra}", f"{', '.join(missing)} missing: {install_extra(extra)}")


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Doctor:
    """Says what this installation can do here, what is missing, and how to get it."""

    def run(self) -> int:
        """Prints the findings; the status is 1 where something is a problem."""
        found = list(findings())
        width = max(len(finding.what) for finding in found)
        for finding in found:
            print(f"{finding.state:7}  {finding.what:{width}}  {finding.text}")
        return int(any(finding.state == "problem" for finding in found))


main = program(Doctor)

if __name__ == "__main__":
    sys.exit(main())
