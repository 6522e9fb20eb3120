"""Runs a program of Megatron-Core's on CPUs: `torchrun tests/harness/run_on_cpu.py PROGRAM ARGUMENT ...`."""

import runpy
import sys
import warnings

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import tests.harness.megatron_on_cpu  # noqa: F401

    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
