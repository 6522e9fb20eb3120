"""Megatron-LM's checkpoints: per-rank files (format `torch`) are read, `torch_dist` is read and written, in any layout."""

from megatron_samoe.convert.megatron.dist_export import DistPlan, plan_dist_export, write_dist_export
from megatron_samoe.convert.megatron.reader import MegatronReader

__all__ = ["DistPlan", "MegatronReader", "plan_dist_export", "write_dist_export"]
