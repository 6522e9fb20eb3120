"""A plug-in for vLLM: it serves exports of our own class, with what layers share in memory once.

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins) and imports the rest when it
loads such a model. experts_plan says what a layer computes with, model builds it on vLLM's Transformers back end.
"""

from __future__ import annotations


def register() -> None:
    """Tells vLLM and transformers of our class, so that its folders need no trust_remote_code."""
    from transformers import AutoConfig, AutoModel
    from vllm import ModelRegistry

    from megatron_samoe.convert.hf.remote_code.configuration_samoe import SamoeConfig
    from megatron_samoe.convert.hf.remote_code.modeling_samoe import SamoeModel

    AutoConfig.register(SamoeConfig.model_type, SamoeConfig, exist_ok=True)
    AutoModel.register(SamoeConfig, SamoeModel, exist_ok=True)
    # By name: whoever serves another model does not import it.
    ModelRegistry.register_model("SamoeForCausalLM", "megatron_samoe.plugins.vllm.model:SamoeForVLLM")
