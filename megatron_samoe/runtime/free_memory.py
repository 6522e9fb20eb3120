"""The memory that a process can still take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch


def free_memory_bytes(device: torch.device) -> int:
    """Returns the bytes that this process can still take: of the device, the machine, and its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        pass
    return min([*free, *free_in_control_groups()])


def free_in_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yields the bytes that limits of this process's control group and of those around it leave.

    Both versions of Linux's groups are read; batch systems and containers limit a job's memory by them.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in lines:
        if number == "0":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = top / path.strip("/")
        for group in (inner, *inner.parents):
            # In a container the path may be the host's, of which only the top is to be seen.
            with suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Files that were read, checkpoints among them, count as used but are given up when memory is needed.
                yield max(limit - used + int(stat.get(names[2], 0)), 0)
            if group == top:
                break
