"""Pretraining of mixture-of-experts language models that share one pool of experts (SaMoE).

`pretrain(config)` trains a model in Python, see `training.run`, and `load("runs/x")` gives a trained one, see
`language_model`. Importing the package loads no torch.
"""

import importlib
import sys
from typing import Any

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # so it is while `python -m megatron_samoe...` looks for its program
    from megatron_samoe.start import prepare

    prepare()

#: What the package's top gives, from a module that is loaded when it is asked for.
_LAZY = {"LanguageModel": "language_model", "load": "language_model", "pretrain": "training.run"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"megatron_samoe.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
