"""Generating text: `load_model`, then an `Engine` that takes requests and gives tokens step by step."""

from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.sampling import SamplingOptions
from megatron_samoe.runtime.load import LoadedModel, load_model

__all__ = ["Engine", "LoadedModel", "Request", "SamplingOptions", "TokenEvent", "load_model"]
