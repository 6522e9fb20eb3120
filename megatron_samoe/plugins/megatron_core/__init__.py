"""Layers that share experts in Megatron-Core; see docs/megatron_core.md.

sharing, experts     the pool and its gradients, and the modules that replace a layer's experts
rank_layout          Megatron-Core's groups as a `ParallelState`
candidates           routers that choose some experts of a set only, and experts that move
options              how layers share, and what is refused
"""

from megatron_samoe.errors import optional_import

optional_import("megatron.core", "megatron-core", __name__)

from megatron_samoe.plugins.megatron_core.sharing import ExpertSharing  # noqa: E402

__all__ = ["ExpertSharing"]
