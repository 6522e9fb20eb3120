"""A model in another precision."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.edited_model import EditedModel
from megatron_samoe.convert.hf.export import native_model
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def recast(source: GlobalTensors, dtype: torch.dtype) -> EditedModel:
    """Returns a model in another precision; what a run keeps in fp32 whatever its precision stays so."""
    native = native_model(source)
    training = replace(native.config.training, bf16=dtype == torch.bfloat16, fp16=False)
    changed = replace(native, config=replace(native.config, training=training))
    edited = EditedModel(to_mapping(changed.config), source.train_state, attachments=source.attachments)
    for name, stored in source.tensors.items():
        if not name.startswith("optimizer."):
            edited.keep(source, name, dtype=changed.tensors.get(name, stored).dtype)
    return edited
