"""Pretraining of mixture-of-experts language models that share one pool of experts (SaMoE).

`load("runs/x")` gives a trained model for Python; see `language_model`. Importing the package loads no torch.
"""

import importlib
import sys
from typing import Any

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # so it is while `python -m megatron_samoe...` looks for its program
    from megatron_samoe.start import prepare

    prepare()

#: What the package's top gives, from a module that is loaded when it is asked for.
_LAZY = ("LanguageModel", "load")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("megatron_samoe.language_model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
