"""Megatron-LM's checkpoints, per-rank files (format `torch`) and `torch_dist`: written for any layout, read from any."""

from megatron_samoe.convert.megatron.dist_export import DistPlan, plan_dist_export, write_dist_export
from megatron_samoe.convert.megatron.export import ExportPlan, plan_export, write_export
from megatron_samoe.convert.megatron.names import MegatronLayout, MegatronStyle
from megatron_samoe.convert.megatron.reader import MegatronReader

__all__ = [
    "DistPlan",
    "ExportPlan",
    "MegatronLayout",
    "MegatronReader",
    "MegatronStyle",
    "plan_dist_export",
    "plan_export",
    "write_dist_export",
    "write_export",
]
