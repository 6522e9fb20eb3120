#!/usr/bin/env python3
"""Measures speed against limits, plain torch and other programs: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_samoe.start import run

if __name__ == "__main__":
    run("megatron_samoe.gpu_check.command")
