"""Megatron-LM's per-rank checkpoints (format `torch`): written for any layout, read from any."""

from megatron_samoe.convert.megatron.export import ExportPlan, plan_export, write_export
from megatron_samoe.convert.megatron.names import MegatronLayout, MegatronStyle
from megatron_samoe.convert.megatron.reader import MegatronReader

__all__ = [
    "ExportPlan",
    "MegatronLayout",
    "MegatronReader",
    "MegatronStyle",
    "plan_export",
    "write_export",
]
