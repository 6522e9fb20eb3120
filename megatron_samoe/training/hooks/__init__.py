"""The work of a run next to its steps: a hook a file (loggers together), and which of them a configuration asks for."""

from megatron_samoe.training.hooks.default import default_hooks

__all__ = ["default_hooks"]
