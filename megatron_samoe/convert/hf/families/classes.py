"""The entries of each class of transformers, with the class's own defaults; a test holds them against transformers."""

from __future__ import annotations

from megatron_samoe.convert.hf.families.entries import Entries, may, needed, never, only, rare

_HEADS = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": may(int)}
#: Of classes that descend from Llama: their sizes differ.
_SHARED = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, **_HEADS, "head_dim": rare(int),
    "hidden_act": only("silu"), "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_dropout": 0.0, "rope_theta": 10000.0, "rope_parameters": may(dict),
    "rope_scaling": may(dict), "partial_rotary_factor": may(float), "original_max_position_embeddings": rare(int),
}  # fmt: skip
_BIASES = {"attention_bias": False, "mlp_bias": False}
#: Written by other programs into Llama's files.
_NOTES = ("is_llama_config", "rope_interleaved")

LLAMA = Entries({**_SHARED, **_BIASES, "head_dim": may(int)}, unread=_NOTES)
MISTRAL = Entries({
    **_SHARED, "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": may(int), "max_position_embeddings": 131072,
    "sliding_window": may(int, 4096),
    "layer_types": never("makes another class of it in transformers (Ministral), which megatron_samoe does not have"),
})  # fmt: skip

_QWEN = {
    **_SHARED, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": may(int, 32),
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": may(int, 4096), "max_window_layers": 28,
    "layer_types": may((list, str)),
}  # fmt: skip
QWEN2 = Entries(_QWEN)
QWEN3 = Entries({**_QWEN, "head_dim": 128, "attention_bias": only(False)})
_QWEN_MOE = {
    **_QWEN, "hidden_size": 2048, "num_hidden_layers": 24, "use_sliding_window": only(False), "decoder_sparse_step": 1,
    "mlp_only_layers": may((list, int)), "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN3_MOE = Entries({
    **{name: entry for name, entry in _QWEN_MOE.items() if name not in ("max_window_layers", "layer_types")},
    "intermediate_size": 6144, "num_key_value_heads": 4, "attention_bias": only(False), "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8,
}, {"num_local_experts": "num_experts"}, ("max_window_layers",))  # fmt: skip
QWEN2_MOE = Entries({
    **_QWEN_MOE, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "qkv_bias": True,
})  # fmt: skip
MIXTRAL = Entries({
    **_SHARED, "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": may(int), "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": may(int), "num_local_experts": 8, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
}, {"num_experts": "num_local_experts"})  # fmt: skip
OLMOE = Entries({
    **_SHARED, "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "attention_bias": only(False), "clip_qkv": may(float), "num_experts": 64,
    "num_experts_per_tok": 8, "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
}, {"num_local_experts": "num_experts"})  # fmt: skip

#: Factors of Granite's classes, which our options have the names of.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_GRANITE = {**_SHARED, **dict.fromkeys(MULTIPLIERS, 1.0)}
GRANITE = Entries({**_GRANITE, **_BIASES})
GRANITE_MOE = Entries({**_GRANITE, "attention_bias": False, "num_local_experts": 8, "num_experts_per_tok": 2,
                       "router_aux_loss_coef": 0.001})  # fmt: skip

_DEEPSEEK = {
    **_SHARED, "attention_bias": only(False), "rms_norm_eps": only(1e-6), "moe_layer_freq": only(1), "q_lora_rank": may(int, 1536),
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_head_dim": rare(int),
    "router_aux_loss_coef": 0.01,
}  # fmt: skip
#: Of DeepSeek's own code, which transformers does not read.
_OWN_CODE = ("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers")
DEEPSEEK_V2 = Entries({
    **_DEEPSEEK, "vocab_size": 102400, "mlp_bias": only(False), "first_k_dense_replace": 0, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": needed(int), "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0,
    "topk_method": only("greedy"), "norm_topk_prob": only(False, None), "scoring_func": only("softmax"),
}, {"num_experts": "n_routed_experts"}, (*_OWN_CODE, "n_group", "topk_group"))  # fmt: skip
DEEPSEEK_V3 = Entries({
    **_DEEPSEEK, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": may(int, 128), "max_position_embeddings": 4096, "first_k_dense_replace": 3,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": may(bool, True), "rope_interleave": only(True),
    "topk_method": only("noaux_tc"), "scoring_func": only("sigmoid"),
}, {"num_local_experts": "n_routed_experts"}, _OWN_CODE)  # fmt: skip

#: Names of GELU's two forms.
_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu")
GPT2 = Entries({
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": may(int),
    "activation_function": only(*_GELU), "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02, "scale_attn_weights": only(True), "scale_attn_by_inverse_layer_idx": only(False),
    "tie_word_embeddings": True,
}, {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer"},
    ("reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
     "summary_first_dropout"))  # fmt: skip
GPT_NEOX = Entries({
    "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576,
    "hidden_act": only("gelu", "gelu_new", "gelu_pytorch_tanh"), "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "max_position_embeddings": 2048, "initializer_range": 0.02, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    "use_parallel_residual": True, "attention_bias": True, "rotary_emb_base": 10000.0, "rotary_pct": 0.25, "rope_parameters": may(dict),
    "rope_scaling": may(dict), "is_decoder": only(False, True),
}, unread=("attention_probs_dropout_prob", "hidden_dropout_prob", "num_key_value_heads"))  # fmt: skip
