"""`megatron-samoe benchmark`: `gpu-check` everywhere, all other benchmarks where the repository is at hand."""

from __future__ import annotations

import importlib
import sys

from megatron_samoe.cli.program import Group, program
from megatron_samoe.gpu_check.check import GpuCheck
from megatron_samoe.installation import checkout

TEXT = "Measures speed against limits, plain torch and other programs in the same run."
ELSEWHERE = "All benchmarks but gpu-check are in a checkout of the repository (tools/benchmarks), which this installation is not."


def benchmarks() -> Group:
    """Returns the benchmarks that there are."""
    root = checkout()
    if root is None or not (root / "tools/benchmarks").is_dir():
        return Group({"gpu-check": GpuCheck}, TEXT, ELSEWHERE)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found = importlib.import_module("tools.benchmarks.command")
    return Group({**found.BENCHMARKS, "gpu-check": GpuCheck}, found.__doc__ or TEXT)


main = program(benchmarks)

if __name__ == "__main__":
    sys.exit(main())
