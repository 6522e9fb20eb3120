"""A family of files: StarCoder2 (Lozhkov et al., arXiv:2402.19173): LayerNorm and biases with rotary positions.

The package that holds it names FAMILY as an entry point of the group "megatron_samoe.hf_families".
"""

from __future__ import annotations

from megatron_samoe.convert.hf.families.base import HEADS, SIZES, Family, Option, constant, same
from megatron_samoe.convert.hf.families.entries import Entries, may, only
from megatron_samoe.convert.hf.families.llama import ATTENTION
from megatron_samoe.convert.hf.families.reading import rotary, window, written_rope
from megatron_samoe.convert.hf.parts import Row, module, modules

#: The class's own defaults; entries that are not here are refused.
ENTRIES = Entries({
    "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24,
    "num_key_value_heads": 2, "head_dim": may(int), "hidden_act": only("gelu_pytorch_tanh"), "max_position_embeddings": 4096,
    "initializer_range": 0.018042, "norm_epsilon": 1e-5, "tie_word_embeddings": True, "use_bias": only(True),
    "attention_dropout": 0.0, "residual_dropout": only(0.0), "embedding_dropout": only(0.0), "sliding_window": may(int),
    "rope_theta": 10000.0, "rope_parameters": may(dict), "rope_scaling": may(dict), "partial_rotary_factor": only(None),
})  # fmt: skip
#: Their name | our name | view; a module's are two, for its weight and its bias. A line is for the models that have our tensor.
TENSORS = (
    Row("model.embed_tokens.weight", "embedding.word.weight"),
    *module("model.layers.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
    *ATTENTION,
    *modules(
        "model.layers.{layer}",
        "layers.{layer}",
        ("post_attention_layernorm", "mlp_norm"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ),
    *module("model.norm", "final_norm"),
    Row("lm_head.weight", "output.weight"),
)
#: Entries of config.json and options of ours.
OPTIONS = (
    *SIZES,
    *HEADS,
    same("norm_epsilon", kind=float),
    constant(hidden_act="gelu_pytorch_tanh", use_bias=True),
    Option(lambda native: written_rope(native.model), rotary),
    Option(lambda native: {"sliding_window": native.model.sliding_window}, window),
)
#: Other values of these options are refused.
FIXED = {
    **dict.fromkeys(("swiglu", "disable_bias_linear", "qk_layernorm"), False),
    **{"expert_layout": "dense", "normalization": "LayerNorm", "position_embedding_type": "rope"},
    **{"rotary_percent": 1.0, "group_query_attention": True, "window_attn_skip_freq": None},
}

FAMILY = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "dense, LayerNorm, rotary positions, biases everywhere",
    tensors=TENSORS,
    entries=ENTRIES,
    options=OPTIONS,
    fixed=FIXED,
)
