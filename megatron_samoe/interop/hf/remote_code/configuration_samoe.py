"""Configuration of a SaMoE language model: a GPT whose MoE layers may share their experts."""

from __future__ import annotations

from transformers import PretrainedConfig


class SamoeConfig(PretrainedConfig):
    """Everything that decides what the model computes.

    Args:
        expert_layout: dense; moe: each MoE layer owns its experts, or as expert_sharing says; samoe: all combine one pool of
            banks.
        expert_sharing: an entry for each MoE layer between commas: own, combined, or the number of the set that it uses; scaled:
            before them gives each layer factors on its set. A*3 stands for A,A,A. A set that one layer uses is its own. pool is
            one set for all; neighbours gives each num_neighbour_layers layers a set, of num_experts times as many.
        pool_lock_step, neighbour_unmask_steps: where either is set, a router has a factor for each expert: 0 closes it.
        moe_layers: for each layer whether it has experts.
        hidden_act: swiglu (gated SiLU) or gelu_tanh.
        rotary_base, rotary_percent: of position_embedding_type rope; others are learned_absolute and none.
        linear_bias: of all linear layers and experts but the query-key-value projection, which has qkv_bias.
        num_experts: of each MoE layer, or a list of one for each.
        router_score_function: softmax, sigmoid, norm: a learned factor times ReLU(logits / their length), or relu: ReLU(logits)
            of all experts where they are positive.
        router_expert_bias: choose experts by score + a bias.
        router_num_groups, router_group_topk: consecutive groups of experts, and how many of them a token may use.
        router_scaling_factor: on the chosen experts' weights.
        residual_mlp: weigh routed experts against a dense MLP by each token.
        router_pre_softmax: weigh experts by their score among all experts rather than among the chosen.
        samoe_granularity: one set of coefficients per layer, or one per layer and expert.
        samoe_normalization: of coefficients: none, l2 or softmax.
    """

    model_type = "samoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self, vocab_size=257, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=None,
        head_dim=None, intermediate_size=1024, max_position_embeddings=256, position_embedding_type="learned_absolute",
        rotary_base=10000.0, rotary_percent=1.0, normalization="LayerNorm", norm_epsilon=1e-5, qk_layernorm=False,
        hidden_act="gelu_tanh", linear_bias=True, qkv_bias=True, expert_layout="dense", moe_layers=None, num_experts=8,
        moe_intermediate_size=None, num_experts_per_tok=1, router_score_function="softmax", router_pre_softmax=True,
        shared_expert_intermediate_size=None, num_expert_banks=2, samoe_granularity="layer", samoe_normalization="none",
        expert_sharing=None, router_expert_bias=False, router_num_groups=None, router_group_topk=None,
        router_scaling_factor=None, residual_mlp=False, num_neighbour_layers=2, neighbour_unmask_steps=0, pool_lock_step=None,
         attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.02,
        use_cache=True, tie_word_embeddings=True, **kwargs,
    ):  # fmt: skip
        if not any(moe_layers or ()) and expert_layout != "dense":
            raise ValueError(f"moe_layers must have a layer with experts for expert_layout {expert_layout!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.position_embedding_type = position_embedding_type
        self.rotary_base = rotary_base
        self.rotary_percent = rotary_percent
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.qk_layernorm = qk_layernorm
        self.hidden_act = hidden_act
        self.linear_bias = linear_bias
        self.qkv_bias = qkv_bias
        self.expert_layout = expert_layout
        self.moe_layers = list(moe_layers) if moe_layers else [False] * num_hidden_layers
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size or intermediate_size
        self.num_experts_per_tok = num_experts_per_tok
        self.router_score_function = router_score_function
        self.router_pre_softmax = router_pre_softmax
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.num_expert_banks = num_expert_banks
        self.samoe_granularity = samoe_granularity
        self.samoe_normalization = samoe_normalization
        self.expert_sharing = expert_sharing
        self.router_expert_bias = router_expert_bias
        self.router_num_groups = router_num_groups
        self.router_group_topk = router_group_topk
        self.router_scaling_factor = router_scaling_factor
        self.residual_mlp = residual_mlp
        self.num_neighbour_layers = num_neighbour_layers
        self.neighbour_unmask_steps = neighbour_unmask_steps
        self.pool_lock_step = pool_lock_step
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.expert_sources()  # of wrong length, it is refused now
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def expert_sources(self):
        """Returns for each layer (way, number of the set or None, number of experts), None for a layer without experts."""
        count = sum(map(bool, self.moe_layers))
        text = self.expert_sharing or ("combined" if self.expert_layout == "samoe" else "own")
        experts = self.num_experts if isinstance(self.num_experts, (list, tuple)) else [self.num_experts] * count
        prefix, _, listed = text.rpartition(":")
        if text in ("own", "combined"):
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
        way = prefix or "tied"
        named = [
            ("own" if way == "tied" and entries.count(e) == 1 else way, int(e)) if e.isdigit() else (e, None)
            for e in entries
        ]
        found = iter((*source, size) for source, size in zip(named, experts))  # noqa: B905
        return [next(found) if is_moe else None for is_moe in self.moe_layers]
