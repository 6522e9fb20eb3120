"""Configuration of a SaMoE language model: a GPT whose MoE layers may share their experts."""

from __future__ import annotations

from typing import NamedTuple, Optional

from transformers import PretrainedConfig

#: Of entries that a configuration does not give.
DEFAULTS = {
    "vocab_size": 257,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 1024,
    "max_position_embeddings": 256,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000.0,
    "rotary_percent": 1.0,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-05,
    "qk_layernorm": False,
    "hidden_act": "gelu_tanh",
    "linear_bias": True,
    "qkv_bias": True,
    "expert_layout": "dense",
    "moe_layers": None,
    "num_experts": 8,
    "moe_intermediate_size": None,
    "num_experts_per_tok": 1,
    "router_score_function": "softmax",
    "router_pre_softmax": True,
    "shared_expert_intermediate_size": None,
    "num_expert_banks": 2,
    "samoe_granularity": "layer",
    "samoe_normalization": "none",
    "expert_sharing": None,
    "lent_experts": None,
    "router_expert_bias": False,
    "router_num_groups": None,
    "router_group_topk": None,
    "router_scaling_factor": None,
    "attention_output_bias": None,
    "qk_layernorm_scope": "head",
    "clip_qkv": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "use_parallel_residual": False,
    "sliding_window": None,
    "window_attn_skip_freq": None,
    "rope_scaling_type": None,
    "rope_scaling_factor": 1.0,
    "rope_original_max_positions": None,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_attention_factor": None,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "shared_expert_gate": False,
    "residual_mlp": False,
    "num_neighbour_layers": 2,
    "neighbour_unmask_steps": 0,
    "pool_lock_step": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}


class ExpertSource(NamedTuple):
    """Where a layer's experts come from.

    Attributes:
        bank: name of the banks in the pool, sets.N for a set; None for experts of the layer's own.
        num_banks: P, which the layer combines.
        normalization: of its coefficients: none, l2 or softmax; None without any: the only bank is used as it is.
    """

    bank: Optional[str]  # noqa: UP045
    num_banks: int
    normalization: Optional[str]  # noqa: UP045
    num_experts: int

    @property
    def combines(self):
        """Whether the layer combines banks, and does not use a set or its own."""
        return self.bank is not None and not self.bank.startswith("sets.")


class SamoeConfig(PretrainedConfig):
    """Everything that decides what the model computes.

    Args:
        expert_layout: dense; moe: each MoE layer owns its experts, or as expert_sharing says; samoe: all combine one pool of
            banks.
        expert_sharing: an entry for each MoE layer between commas: own, combined, or the number of the set that it uses; scaled:
            before them gives each layer factors on its set. A*3 stands for A,A,A. A set that one layer uses is its own. pool is
            one set for all; neighbours gives each num_neighbour_layers layers a set, of num_experts times as many.
        lent_experts: for each MoE layer the first three of `ExpertSource`, where expert_sharing names a way of another package.
        pool_lock_step, neighbour_unmask_steps: where either is set, a router has a factor for each expert: 0 closes it.
        moe_layers: for each layer whether it has experts.
        hidden_act: swiglu (gated SiLU), gelu_tanh or gelu (exact).
        rotary_base, rotary_percent: of position_embedding_type rope; others are learned_absolute and none.
        rope_scaling_type: linear, llama3 or yarn, by rope_scaling_factor, rope_original_max_positions and what each has besides.
        linear_bias: of all linear layers and experts but the query-key-value projection, which has qkv_bias, and attention's
            output projection, where attention_output_bias is given.
        qk_layernorm, qk_layernorm_scope: norms of queries and keys, of each head or of all heads together.
        clip_qkv: queries, keys and values are cut to [-c, c], after their norms.
        attention_multiplier, embedding_multiplier, residual_multiplier: factors on scores (1 / sqrt(head_dim) if None), embeddings,
            and what attention and MLPs add to the residual stream. logits_scaling: divisor of logits.
        use_parallel_residual: a layer's MLP reads the layer's input, as its attention does.
        sliding_window, window_attn_skip_freq: most tokens that a token attends to, but in every N-th layer.
        multi_latent_attention: keys and values from a latent of kv_lora_rank, and queries from one of q_lora_rank, if given; a head
            has qk_head_dim channels without positions, qk_pos_emb_head_dim with, and v_head_dim of values.
        num_experts: of each MoE layer, or a list of one for each.
        router_score_function: softmax, sigmoid, norm: a learned factor times ReLU(logits / their length), or relu: ReLU(logits)
            of all experts where they are positive.
        router_expert_bias: choose experts by score + a bias.
        router_num_groups, router_group_topk: consecutive groups of experts, and how many of them a token may use.
        router_scaling_factor: on the chosen experts' weights.
        shared_expert_gate: weigh the expert that every token passes by a sigmoid of each token.
        residual_mlp: weigh routed experts against a dense MLP by each token.
        router_pre_softmax: weigh experts by their score among all experts rather than among the chosen.
        router_aux_loss_coef, output_router_logits: weight of the balance loss, and whether it is added to the loss; in models
            with `has_balance_loss`.
        samoe_granularity: one set of coefficients per layer, or one per layer and expert.
        samoe_normalization: of coefficients: none, l2 or softmax.
    """

    model_type = "samoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits"]  # noqa: RUF012
    #: Experts and routers are whole on every rank.
    base_model_tp_plan = {  # noqa: RUF012
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.self_attn.o_proj": "rowwise",
        **{f"layers.*.mlp.{part}{name}_proj": "colwise" for part in ("", "shared_expert.") for name in ("gate", "up")},
        **{f"layers.*.mlp.{part}down_proj": "rowwise" for part in ("", "shared_expert.")},
    }

    def __init__(self, tie_word_embeddings=True, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        if not any(self.moe_layers or ()) and self.expert_layout != "dense":
            raise ValueError(f"moe_layers must have a layer with experts for expert_layout {self.expert_layout!r}")
        if self.expert_layout == "dense":
            self.num_experts = 0  # which tells others that it has none
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.moe_layers = list(self.moe_layers) if self.moe_layers else [False] * self.num_hidden_layers
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        balance = kwargs.pop("router_aux_loss_coef", 0.0), kwargs.pop("output_router_logits", False)
        if self.has_balance_loss:  # trainers ask whether there is one by the entries' presence
            self.router_aux_loss_coef, self.output_router_logits = balance
        if self.attention_output_bias is None:
            self.attention_output_bias = self.linear_bias
        kwargs.pop("layer_types", None)  # derived
        if self.has_whole_attention:
            self.base_model_tp_plan = {n: way for n, way in self.base_model_tp_plan.items() if ".self_attn." not in n}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def layer_types(self):
        """Kind of attention of each layer; transformers chooses caches by it."""
        every = 1 if self.sliding_window is None else self.window_attn_skip_freq or self.num_hidden_layers + 1
        return [
            "full_attention" if i % every == 0 else "sliding_attention" for i in range(1, self.num_hidden_layers + 1)
        ]

    @property
    def has_whole_attention(self):
        """Whether attention has a norm over all heads, or a latent of all, so that no rank can have a part of it."""
        return self.multi_latent_attention or (self.qk_layernorm and self.qk_layernorm_scope == "all")

    @property
    def has_balance_loss(self):
        """Whether transformers' balance loss fits: it knows softmax routers by their logits, and one number of experts."""
        sources = [source for source in self.expert_sources() if source is not None]
        one_number = bool(sources) and all(source.num_experts == self.num_experts for source in sources)
        by_logits = not self.router_expert_bias and self.router_num_groups is None
        return one_number and by_logits and self.router_score_function == "softmax"

    def expert_sources(self):
        """Returns for each layer where its experts come from, None for a layer without experts."""
        count = sum(map(bool, self.moe_layers))
        text = self.expert_sharing or ("combined" if self.expert_layout == "samoe" else "own")
        experts = self.num_experts if isinstance(self.num_experts, (list, tuple)) else [self.num_experts] * count
        prefix, _, listed = text.rpartition(":")
        named = {"own": (None, 1, None), "combined": ("bank", self.num_expert_banks, self.samoe_normalization)}
        if self.lent_experts is not None:
            entries = self.lent_experts
        elif text in named:
            entries = [text] * count
        elif text in ("pool", "neighbours"):
            block = count if text == "pool" else self.num_neighbour_layers
            entries = [str(i // block) for i in range(count)]
            if text == "neighbours":
                experts = [size * entries.count(entry) for size, entry in zip(experts, entries)]  # noqa: B905
        else:
            parts = [part.partition("*") for part in listed.split(",")]
            entries = [entry for entry, _, times in parts for _ in range(int(times or 1))]
        if not len(entries) == len(experts) == count:
            raise ValueError(
                f"expert_sharing {text!r} and num_experts {self.num_experts!r} must fit {count} MoE layers"
            )

        def lent(entry):
            if not isinstance(entry, str):
                return entry
            if entry in named:
                return named[entry]
            factor = "none" if prefix == "scaled" else None
            return named["own"] if factor is None and entries.count(entry) == 1 else (f"sets.{entry}", 1, factor)

        found = iter(ExpertSource(*lent(entry), size) for entry, size in zip(entries, experts))  # noqa: B905
        return [next(found) if is_moe else None for is_moe in self.moe_layers]
