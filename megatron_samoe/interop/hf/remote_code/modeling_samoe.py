"""A SaMoE language model for transformers, self-contained.

A GPT (pre-norm, causal) with learned or rotary positions, LayerNorm or RMSNorm, GELU or gated SiLU MLPs, grouped
queries, and layers whose MLP is a mixture of experts. As expert_sharing says, a layer's experts are its own, a set that
other layers use as well (times its factors), or combinations of one pool of banks with the layer's coefficients.
`fold_pool` makes them all each layer's own.

Shapes: B sequences, S tokens, T = B S, H hidden, G key-value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_samoe import SamoeConfig
from .moe_samoe import MLP, ExpertPool, MoE, Weights

# Transformers 5 renames the cache's field.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Norm(nn.Module):
    """LayerNorm, or RMSNorm without a bias, over the last dim."""

    def __init__(self, config, size):
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.normalization == "LayerNorm" else None

    def forward(self, x):
        """Returns x normalised."""
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def rotary_tables(config, positions, dtype):
    """Returns cos and sin, [B, S, 1, R] for R rotated channels of a head, made in fp32."""
    rotated = int(config.head_dim * config.rotary_percent)
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated
    angles = positions[..., None].float() * config.rotary_base**-exponents
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x, tables):
    """Returns x [B, S, heads, D] with its first R channels rotated."""
    cos, sin = tables
    rotated = cos.shape[-1]
    turn, rest = x[..., :rotated], x[..., rotated:]
    first, second = turn.chunk(2, -1)
    turned = turn * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Causal self-attention; the fused projection is [G, queries per key + 2, D, H]."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.per_group = heads // groups
        self.qkv = Weights((groups, self.per_group + 2, size, config.hidden_size), config.qkv_bias)
        self.output = Weights((config.hidden_size, heads * size), config.linear_bias)
        self.q_norm = Norm(config, size) if config.qk_layernorm else None
        self.k_norm = Norm(config, size) if config.qk_layernorm else None

    def forward(self, x, mask, rotary, cache):
        """Returns y [B, S, H]; mask is [B, 1, S, keys], or None for plain causal attention."""
        batch, length = x.shape[:2]
        qkv = self.qkv(x).view(batch, length, -1, self.per_group + 2, self.config.head_dim)
        q, k, v = qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2], qkv[:, :, :, -1]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": self.per_group > 1}
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
        return self.output(y.transpose(1, 2).flatten(2))


def shared_ways(config):
    """Returns the ways in which MoE layers come by their experts."""
    return {source[0] for source in config.expert_sources() if source is not None}


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, index, source):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention_norm = Norm(config, config.hidden_size)
        self.attention = Attention(config, index)
        self.mlp_norm = Norm(config, config.hidden_size)
        if source is not None:
            self.moe = MoE(config, source)
        else:
            self.mlp = MLP(config, config.intermediate_size)

    def forward(self, x, mask, rotary, cache, pool):
        """Returns the next residual stream [B, S, H]."""
        y = self.attention(self.attention_norm(x), mask, rotary, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp_norm(x)
        y = self.moe(y.flatten(0, 1), pool).view(x.shape) if hasattr(self, "moe") else self.mlp(y)
        return x + F.dropout(y, self.dropout, self.training)


class Embedding(nn.Module):
    """Token embedding, and learned positions where the model has them."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned_absolute"
        shape = (config.max_position_embeddings, config.hidden_size)
        self.position = nn.Parameter(torch.empty(shape)) if learned else None


class SamoePreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    config_class = SamoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        # As in training, whatever the dtype of the rest; transformers 4 refuses names that a model lacks.
        ways = shared_ways(config)
        kept = {"router": ways, "mixing": ways and (config.residual_mlp or config.shared_expert_gate), "expert_pool": ways - {"own"},
                "combination": ways & {"combined", "scaled"}}  # fmt: skip
        self._keep_in_fp32_modules_strict = [name for name, is_there in kept.items() if is_there]

    def _init_weights(self, module):
        std = self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Norm):
                (nn.init.ones_ if name == "weight" else nn.init.zeros_)(parameter)
            elif name in ("bias", "b1", "b2", "expert_bias"):
                nn.init.zeros_(parameter)
            elif name == "combination":
                nn.init.constant_(parameter, parameter.shape[-1] ** -0.5)
            elif name in ("scale", "candidates", "loss_weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, std)


class SamoeModel(SamoePreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, i, source) for i, source in enumerate(config.expert_sources()))
        self.final_norm = Norm(config, config.hidden_size)
        self.expert_pool = ExpertPool(config) if shared_ways(config) - {"own"} else None
        self.post_init()

    def get_input_embeddings(self):
        """Returns the token embedding."""
        return self.embedding.word

    def set_input_embeddings(self, value):
        """Puts another token embedding in."""
        self.embedding.word = value

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_hidden_states=False, cache=None, **kwargs,
    ):  # fmt: skip
        """Returns the last hidden states [B, S, H], and the cache if one is used.

        Args:
            attention_mask: [B, keys], 0 for padding; or [B, 1, S, keys], true (or 0.0) where a query may look.
            past_key_values, cache: keys and values of earlier tokens, under either name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: fused attention makes no weights")
        cache = cache if cache is not None else past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        x = self.embedding.word(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        position_ids = position_ids.expand(x.shape[0], -1)
        if self.embedding.position is not None:
            x = x + F.embedding(position_ids, self.embedding.position)
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        uses_rotary = self.config.position_embedding_type == "rope"
        rotary = rotary_tables(self.config, position_ids, x.dtype) if uses_rotary else None
        mask = attention_bias(attention_mask, x.shape[1], past, x.device)
        hidden_states = [x]
        for layer in self.layers:
            x = layer(x, mask, rotary, cache, self.expert_pool)
            hidden_states.append(x)
        x = self.final_norm(x)
        all_states = (*hidden_states[:-1], x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=all_states, **{_CACHE: cache})


def attention_bias(mask, length, past, device):
    """Returns the mask [B, 1, S, keys] of `length` queries after `past` tokens; None for plain causal attention."""
    if mask is not None and mask.dim() == 4:
        return mask
    if past == 0 and (mask is None or bool(mask.all())):
        return None
    keys = past + length
    causal = torch.ones(length, keys, dtype=torch.bool, device=device).tril(past)
    if mask is None:
        return causal[None, None]
    itself = causal.triu(past)  # a query of padding sees itself, so that its softmax is defined
    return (causal & mask[:, None, :keys].bool() | itself)[:, None]


class SamoeForCausalLM(SamoePreTrainedModel, GenerationMixin):
    """The model with its output layer, which is the embedding where weights are tied."""

    def __init__(self, config):
        super().__init__(config)
        self.model = SamoeModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_hidden_states=None, return_dict=None, logits_to_keep=0, cache=None,
                **kwargs):  # fmt: skip
        """Returns logits [B, S, V], and the mean loss of the next token if labels are given (-100 is left out)."""
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            bool(output_hidden_states), cache, **kwargs,
        )  # fmt: skip
        x = output.last_hidden_state
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        head = self.model.embedding.word if self.config.tie_word_embeddings else self.lm_head
        logits = F.linear(x, head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        passed_on = {name: getattr(output, name) for name in (_CACHE, "hidden_states")}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **passed_on)
        return result if return_dict is not False else result.to_tuple()

    @torch.no_grad()
    def fold_pool(self):
        """Gives every layer its own experts, combined now, and drops what they share; returns the model.

        It computes the same function afterwards, without combining, and is as large as a standard MoE.
        """
        pool, dtype = self.model.expert_pool, self.model.embedding.word.weight.dtype
        if pool is None:
            return self
        if self.config.pool_lock_step is not None or self.config.neighbour_unmask_steps:
            raise ValueError(
                "a model whose candidates change while it trains cannot be folded: its routers keep their factors"
            )
        for layer in self.model.layers:
            if not hasattr(layer, "moe") or layer.moe.source[0] == "own":
                continue
            moe, (_, number, count) = layer.moe, layer.moe.source
            a, names = moe.coefficients(), (pool.bank if number is None else pool.set[str(number)])
            own = {n: torch.stack([pool.expert(moe.source, n, e, a, dtype) for e in range(count)]) for n in names}
            moe.experts = nn.ParameterDict({n: nn.Parameter(t) for n, t in own.items()})
            moe.source = ("own", None, count)
            if a is not None:
                del moe.combination
        self.model.expert_pool = None
        for config in (self.config, self.model.config):
            counts = [source[2] for source in config.expert_sources() if source is not None]
            config.expert_layout, config.expert_sharing, config.num_experts = "moe", None, counts
        return self
