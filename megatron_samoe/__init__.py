"""Pretraining of mixture-of-experts language models that share one pool of experts (SaMoE)."""

__version__ = "0.1.0"
