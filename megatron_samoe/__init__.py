"""Pretraining of mixture-of-experts language models that share one pool of experts (SaMoE)."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # so it is while `python -m megatron_samoe...` looks for its program
    from megatron_samoe.start import prepare

    prepare()
