"""The families of classes that models are exported to and imported from, in the order of preference."""

from megatron_samoe.interop.hf.families.base import Family
from megatron_samoe.interop.hf.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_samoe.interop.hf.families.experts import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from megatron_samoe.interop.hf.families.gpt import GPT2, GPT_NEOX
from megatron_samoe.interop.hf.families.samoe import SAMOE

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX, MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE, SAMOE)

__all__ = ["FAMILIES", "SAMOE", "Family"]
