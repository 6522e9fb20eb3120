"""A SaMoE language model for transformers, self-contained.

A GPT (pre-norm, causal) with learned or rotary positions, LayerNorm or RMSNorm, GELU or gated SiLU MLPs, grouped
queries, and layers whose MLP is a mixture of experts. As expert_sharing says, a layer's experts are its own, a set that
other layers use as well (times its factors), or combinations of one pool of banks with the layer's coefficients.
`fold_pool` makes them all each layer's own.

Modules, attention and experts follow transformers' conventions, so that programs which rebuild its models (vLLM's
Transformers back end, tensor parallelism, adapters) find their way.

Shapes: B sequences, S tokens, T = B S, H hidden, G key-value heads, D head size.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .attention_samoe import Attention, LatentAttention, make_norm, rotary_tables
from .configuration_samoe import ExpertSource, SamoeConfig
from .moe_samoe import MLP, ExpertPool, Experts, Lent, MoE, experts_name

# Transformers 5 renames the cache's field, and arguments of the mask.
_CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_OF_MASK = inspect.signature(create_causal_mask).parameters


class SamoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); with use_parallel_residual x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, config, index, source):
        super().__init__()
        self.dropout, self.multiplier = config.hidden_dropout, config.residual_multiplier
        self.is_parallel = config.use_parallel_residual
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = (LatentAttention if config.multi_latent_attention else Attention)(config, index)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.has_experts = source is not None  # an adapter may take the place of the module that tells
        self.mlp = MoE(config, source) if self.has_experts else MLP(config, config.intermediate_size)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        lent=None,
        cache_position=None,
        **kwargs,
    ):
        """Returns the next residual stream [B, S, H], and the router's logits [T, E] or None.

        Args:
            attention_mask: by kind of attention, as `SamoeModel.causal_masks` makes it.
            cache_position: indices in the cache of these tokens [S].
        """
        x = hidden_states
        mask = None if attention_mask is None else attention_mask[self.self_attn.kind]
        y, _ = self.self_attn(self.input_layernorm(x), position_embeddings, mask, cache, cache_position, **kwargs)
        normed = self.post_attention_layernorm(x) if self.is_parallel else None
        x = torch.add(x, F.dropout(y, self.dropout, self.training), alpha=self.multiplier)
        normed = self.post_attention_layernorm(x) if normed is None else normed
        # Logits are a result, since only results have gradients where layers are computed again.
        y, logits_TE = self.mlp(normed, lent) if self.has_experts else (self.mlp(normed), None)
        return torch.add(x, F.dropout(y, self.dropout, self.training), alpha=self.multiplier), logits_TE


class SamoePreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    config_class = SamoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SamoeDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # As in training, whatever the dtype of the rest; transformers 4 refuses names that a model lacks.
        sources = [source for source in config.expert_sources() if source is not None]
        kept = {
            "router": sources,
            "mixing": sources and (config.residual_mlp or config.shared_expert_gate),
            "expert_pool": any(source.bank for source in sources),
            "combination": any(source.normalization for source in sources),
        }
        self._keep_in_fp32_modules_strict = [name for name, is_there in kept.items() if is_there]

    def _init_weights(self, module):
        std = self.config.initializer_range
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                (nn.init.ones_ if name == "weight" else nn.init.zeros_)(parameter)
            elif name.endswith("bias"):
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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding_type == "learned_absolute"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(
            SamoeDecoderLayer(config, i, source) for i, source in enumerate(config.expert_sources())
        )
        self.norm = make_norm(config, config.hidden_size)
        is_shared = any(source is not None and source.bank for source in config.expert_sources())
        self.expert_pool = ExpertPool(config) if is_shared else None
        self.post_init()

    def get_input_embeddings(self):
        """Returns the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value):
        """Puts another token embedding in."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=False,
        cache=None,
        return_dict=None,
        cache_position=None,
        output_router_logits=False,
        **kwargs,
    ):
        """Returns the last hidden states [B, S, H], the cache if one is used, and routers' logits [T, E] if asked for.

        Args:
            attention_mask: [B, keys], 0 for padding; or [B, 1, S, keys], true (or 0.0) where a query may look; or
                masks by kind of attention, as `generate` makes them for static caches.
            past_key_values, cache: keys and values of earlier tokens, under either name.
            cache_position: indices in the cache of these tokens [S]; with padding they are not their positions.
            kwargs: go to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions is not supported: fused attention makes no weights")
        if output_router_logits and not self.config.has_balance_loss:
            raise ValueError(
                "output_router_logits is for the balance loss of transformers, which knows softmax routers without biases and "
                "groups, and one number of experts in all layers"
            )
        cache = cache if cache is not None else past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache_position is None:
            past = 0 if cache is None else int(cache.get_seq_length())
            cache_position = torch.arange(past, past + x.shape[1], device=x.device)
        position_ids = (cache_position[None] if position_ids is None else position_ids).expand(x.shape[0], -1)
        masks = self.causal_masks(x, attention_mask, cache, position_ids, cache_position)
        x = x * self.config.embedding_multiplier
        if self.embed_positions is not None:
            allowed = self.embed_positions.num_embeddings
            # Not on a GPU, which each step would wait for.
            readable = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
            if readable and (last := int(position_ids.max())) >= allowed:
                raise ValueError(f"the model has learned {allowed} positions; the sequence needs {last + 1}")
            x = x + self.embed_positions(position_ids)
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        uses_rotary = self.config.position_embedding_type == "rope"
        rotary = rotary_tables(self.config, position_ids, x.dtype) if uses_rotary else None
        hidden_states, router_logits, lent = [x], [], Lent(self.expert_pool)
        for layer in self.layers:
            x, logits_TE = layer(x, rotary, masks, cache, lent, cache_position, **kwargs)
            hidden_states.append(x)
            router_logits += [] if logits_TE is None else [logits_TE]
        x = self.norm(x) / self.config.logits_scaling  # fewer numbers than logits
        all_states = (*hidden_states[:-1], x) if output_hidden_states else None
        logits = tuple(router_logits) if output_router_logits else None
        results = {"last_hidden_state": x, "hidden_states": all_states, "router_logits": logits, _CACHE: cache}
        output = MoeModelOutputWithPast(**results)
        return output if return_dict is not False else output.to_tuple()

    def causal_masks(self, x, attention_mask, cache, position_ids, cache_position):
        """Returns the mask as the attention function wants it, for each kind of attention that layers have."""
        if isinstance(attention_mask, dict):
            return attention_mask
        given = {"config": self.config, "inputs_embeds": x, "input_embeds": x, "attention_mask": attention_mask}
        given |= {
            "past_key_values": cache,
            "cache": cache,
            "position_ids": position_ids,
            "cache_position": cache_position,
        }
        given = {name: value for name, value in given.items() if name in _OF_MASK}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {kind: makers[kind](**given) for kind in {layer.self_attn.kind for layer in self.layers}}


class SamoeForCausalLM(SamoePreTrainedModel, GenerationMixin):
    """The model with its output layer, whose weight is the embedding's where weights are tied."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = SamoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        cache=None,
        output_router_logits=None,
        **kwargs,
    ):
        """Returns logits [B, S, V], and the loss of the next token if labels are given (-100 is left out).

        Args:
            output_router_logits: also return routers' logits and their balance loss over all tokens but padding, and add this
                to the loss by the configuration's router_aux_loss_coef.
            kwargs: num_items_in_batch: what the sum of tokens' losses is divided by, in place of their number; others go to
                the attention function.
        """
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            bool(output_hidden_states),
            cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        x = output.last_hidden_state
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.lm_head(x)
        loss = balance = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if output_router_logits:
            balance = self.balance_loss(output.router_logits, attention_mask)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * balance.to(loss.device)
        passed_on = {name: getattr(output, name) for name in (_CACHE, "hidden_states", "router_logits")}
        result = MoeCausalLMOutputWithPast(loss=loss, aux_loss=balance, logits=logits, **passed_on)
        return result if return_dict is not False else result.to_tuple()

    def balance_loss(self, router_logits, attention_mask):
        """Returns Mixtral's balance loss, over all layers together, by the function of transformers that Mixtral's class calls.

        Args:
            attention_mask: [B, S], 0 for padding; one of another shape is ignored.
        """
        marks_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.numel() == len(router_logits[0])
        return load_balancing_loss_func(
            router_logits,
            self.config.num_experts,
            self.config.num_experts_per_tok,
            attention_mask if marks_padding else None,
        )

    @torch.no_grad()
    def fold_pool(self):
        """Gives every layer its own experts, combined now, and drops what they share; returns the model.

        It computes the same function afterwards, without combining, and is as large as a standard MoE.
        """
        pool, dtype = self.model.expert_pool, self.model.embed_tokens.weight.dtype
        if pool is None:
            return self
        if self.config.pool_lock_step is not None or self.config.neighbour_unmask_steps:
            raise ValueError(
                "a model whose candidates change while it trains cannot be folded: its routers keep their factors"
            )
        folded = {}
        for i, layer in enumerate(self.model.layers):
            if isinstance(layer.mlp, MoE) and layer.mlp.source.bank is not None:
                folded[i] = {name: w.to(dtype) for name, w in layer.mlp.own_experts(pool).items()}
        counts = [source.num_experts for source in self.config.expert_sources() if source is not None]
        self.model.expert_pool = None
        for config in (self.config, self.model.config):
            config.expert_layout, config.expert_sharing, config.lent_experts = "moe", None, None
            config.num_experts = counts[0] if len(set(counts)) == 1 else counts
        for i, weights in folded.items():
            moe = self.model.layers[i].mlp
            moe.source = ExpertSource(None, 1, None, moe.source.num_experts)
            with torch.device("meta"):
                experts = Experts(self.config, moe.source.num_experts)
            experts.load_state_dict(weights, assign=True)
            moe.add_module(experts_name(self.config), experts)
            if hasattr(moe, "combination"):
                del moe.combination
        return self
