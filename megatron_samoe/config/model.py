"""Options of the transformer: sizes, style, regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_samoe.config import needs
from megatron_samoe.config.option import (
    ABOVE_ZERO,
    BELOW_ONE,
    BY_RULES,
    HERE_ALONE,
    NOT_MEGATRON,
    POSITIVE,
    READERS,
    model_option,
)


@dataclass(frozen=True)
class ModelConfig:
    """Network size and style. The defaults are GPT-3's style; flags give LLaMA's."""

    num_layers: int = model_option(8, READERS, range=POSITIVE, largest=100_000)
    """Number of transformer layers."""
    hidden_size: int = model_option(256, READERS, range=POSITIVE)
    """Width of the residual stream (H)."""
    ffn_hidden_size: int | None = model_option(None, READERS, range=POSITIVE)
    """Width of a dense MLP (F). Derived if not given: 4 H, or 8/3 H rounded to 64 with --swiglu."""
    num_attention_heads: int = model_option(8, READERS, range=POSITIVE)
    """Number of attention heads (A)."""
    kv_channels: int | None = model_option(None, READERS, range=POSITIVE)
    """Size of one attention head (D). Derived if not given: hidden size / heads."""
    group_query_attention: bool = model_option(False, READERS)
    """Let several query heads share one key-value head."""
    num_query_groups: int = model_option(1, READERS, range=POSITIVE, needs=needs.GROUPED_QUERIES)
    """Number of key-value heads with --group-query-attention."""
    seq_length: int = model_option(256, READERS, range=POSITIVE, may_differ=True)
    """Tokens of one training sample (S)."""
    max_position_embeddings: int | None = model_option(None, READERS, range=POSITIVE, may_differ=True)
    """Longest sequence that learned positions cover. Derived if not given: the sequence length."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = model_option("learned_absolute", READERS)
    """How positions enter the model."""
    rotary_base: float = model_option(10000.0, READERS, range=ABOVE_ZERO, needs=needs.ROTARY)
    """Base of the rotary angles."""
    rotary_percent: float = model_option(1.0, READERS, range=BY_RULES, needs=needs.ROTARY)
    """Share of each head's channels that is rotated."""
    rope_scaling_type: Literal["linear", "llama3", "yarn"] | None = model_option(None, READERS, needs=needs.ROTARY)
    """How rotary angles are stretched for sequences longer than those a model was trained on: all by the same factor, as
    Llama 3's, or as YaRN's (arXiv:2309.00071)."""
    rope_scaling_factor: float = model_option(1.0, READERS, range=ABOVE_ZERO, needs=needs.ROPE_SCALING)
    """Factor by which they are stretched."""
    rope_original_max_positions: int | None = model_option(None, READERS, range=POSITIVE, needs=needs.TRAINED_LENGTH)
    """Length of the sequences that the model was trained on before."""
    rope_low_freq_factor: float = model_option(1.0, NOT_MEGATRON, range=ABOVE_ZERO, needs=needs.LLAMA3_ROPE)
    """llama3: angles that turn less often than this over the trained length are stretched in full."""
    rope_high_freq_factor: float = model_option(4.0, NOT_MEGATRON, range=ABOVE_ZERO, needs=needs.LLAMA3_ROPE)
    """llama3: angles that turn more often than this stay as they are."""
    yarn_beta_fast: float = model_option(32.0, READERS, range=ABOVE_ZERO, needs=needs.YARN)
    """YaRN: angles that turn more often than this over the trained length stay as they are."""
    yarn_beta_slow: float = model_option(1.0, READERS, range=ABOVE_ZERO, needs=needs.YARN)
    """YaRN: angles that turn less often than this are stretched in full."""
    yarn_attention_factor: float | None = model_option(None, READERS, range=ABOVE_ZERO, needs=needs.YARN)
    """YaRN: factor on rotated queries and keys. Derived if not given: 0.1 ln(factor) + 1."""
    normalization: Literal["LayerNorm", "RMSNorm"] = model_option("LayerNorm", READERS)
    """Kind of the normalisation layers."""
    norm_epsilon: float = model_option(1e-5, READERS, range=ABOVE_ZERO)
    """Added to the variance (LayerNorm) or mean square (RMSNorm)."""
    swiglu: bool = model_option(False, READERS)
    """Gated SiLU MLPs and experts instead of GELU ones."""
    exact_gelu: bool = model_option(False, NOT_MEGATRON, needs=needs.GELU)
    """GELU by the error function rather than its tanh form."""
    disable_bias_linear: bool = model_option(False, READERS)
    """No bias in linear layers and experts."""
    add_qkv_bias: bool = model_option(False, READERS, needs=needs.NO_BIAS)
    """Keep the bias of the query-key-value projection with --disable-bias-linear."""
    attention_bias: bool | None = model_option(None, NOT_MEGATRON)
    """Biases of both projections of attention. Derived if not given: as all other linear layers have them."""
    untie_embeddings_and_output_weights: bool = model_option(False, READERS)
    """Give the output layer its own matrix."""
    qk_layernorm: bool = model_option(False, READERS)
    """Normalise queries and keys before attention."""
    qk_layernorm_scope: Literal["head", "all"] = model_option("head", NOT_MEGATRON, needs=needs.QK_NORM)
    """head: the queries and the keys of each head separately. all: those of all heads together, before they are split into heads
    (OLMoE)."""
    clip_qkv: float | None = model_option(None, NOT_MEGATRON, range=ABOVE_ZERO)
    """c: queries, keys and values are cut to [-c, c], after their norms (OLMo)."""
    attention_multiplier: float | None = model_option(None, READERS, range=ABOVE_ZERO)
    """Factor on the products of queries and keys (Granite). Derived if not given: 1 / sqrt(size of a head's queries)."""
    embedding_multiplier: float = model_option(1.0, NOT_MEGATRON, range=ABOVE_ZERO)
    """Factor on token embeddings (Granite)."""
    residual_multiplier: float = model_option(1.0, NOT_MEGATRON, range=ABOVE_ZERO)
    """Factor on what attention and MLPs add to the residual stream (Granite)."""
    logits_scaling: float = model_option(1.0, NOT_MEGATRON, range=ABOVE_ZERO)
    """Divisor of the output's logits (Granite)."""
    use_parallel_residual: bool = model_option(False, NOT_MEGATRON)
    """Give a layer's MLP the layer's input, as its attention, and add both (GPT-NeoX)."""
    sliding_window: int | None = model_option(None, NOT_MEGATRON, range=POSITIVE)
    """Most tokens that a token attends to: itself and those before it. Not all earlier ones, if given."""
    window_attn_skip_freq: int | None = model_option(None, NOT_MEGATRON, range=BY_RULES, needs=needs.WINDOW)
    """N: every N-th layer attends to all earlier tokens in spite of --sliding-window."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = model_option("vanilla", HERE_ALONE)
    """Attention weights. off-by-one: 1 is added to the sum of the exponentials, so that a head may attend to nothing.
    learnable: the exponential of a number learned for each head is added (a sink)."""
    attn_logit_softcapping: float | None = model_option(None, HERE_ALONE, range=ABOVE_ZERO)
    """c: attention scores s become c tanh(s / c)."""
    final_logit_softcapping: float | None = model_option(None, HERE_ALONE, range=ABOVE_ZERO)
    """The same of the output's logits."""
    multi_latent_attention: bool = model_option(False, READERS)
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads from one small vector per token."""
    q_lora_rank: int | None = model_option(None, READERS, range=POSITIVE, needs=needs.LATENTS)
    """Size of the latent that queries are made from; queries are made from the residual stream if not given."""
    kv_lora_rank: int = model_option(512, READERS, range=POSITIVE, needs=needs.LATENTS)
    """Size of the latent that keys and values are made from."""
    qk_head_dim: int = model_option(128, READERS, range=POSITIVE, needs=needs.LATENTS)
    """Channels of a head's queries and keys without positions."""
    qk_pos_emb_head_dim: int = model_option(64, READERS, range=POSITIVE, needs=needs.LATENTS)
    """Channels of queries, and of the key that all heads share, which are rotated."""
    v_head_dim: int = model_option(128, READERS, range=POSITIVE, needs=needs.LATENTS)
    """Channels of a head's values."""
    init_method_std: float = model_option(0.02, READERS, range=ABOVE_ZERO, may_differ=True)
    """Standard deviation of initial weights; output projections use it divided by sqrt(2 * num_layers)."""
    attention_dropout: float = model_option(0.0, READERS, range=BELOW_ONE, may_differ=True)
    """Dropout probability of attention weights: the only noise that depends on the layout, since fused kernels draw it."""
    hidden_dropout: float = model_option(0.0, READERS, range=BELOW_ONE, may_differ=True)
    """Dropout probability of embeddings and of each sub-layer's output."""
    make_vocab_size_divisible_by: int = model_option(128, READERS, range=POSITIVE)
    """The vocabulary is padded to a multiple of this in every layout; the tensor-parallel size must divide it. The
    softmax leaves padding out.
    """

    @property
    def output_init_std(self) -> float:
        """Standard deviation of projections that end on the residual stream (GPT-2: smaller by the root of their
        number).
        """
        return self.init_method_std / (2 * self.num_layers) ** 0.5

    @property
    def mlp_size(self) -> int:
        """F, the width of a dense MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def head_dim(self) -> int:
        """D, the size of one attention head."""
        return self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def query_dim(self) -> int:
        """Channels of a head's query with latent attention."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.qk_pos_emb_head_dim if self.multi_latent_attention else int(self.head_dim * self.rotary_percent)

    @property
    def latent_dim(self) -> int:
        """Numbers of a token that latent attention keeps in a layer's cache."""
        return self.kv_lora_rank + self.qk_pos_emb_head_dim

    def cached_numbers(self, tensor_parallel_size: int = 1) -> int:
        """Returns the numbers of a token that a rank keeps in a layer's cache."""
        if self.multi_latent_attention:
            return self.latent_dim
        return 2 * self.head_dim * self.num_kv_heads // tensor_parallel_size

    def window_of(self, layer: int) -> int | None:
        """Returns the window of a layer's attention, counted from 0; None where it attends to all earlier tokens."""
        skip = self.window_attn_skip_freq
        return None if skip is not None and (layer + 1) % skip == 0 else self.sliding_window

    @property
    def cache_window(self) -> int | None:
        """Tokens that layers look back at while a sequence grows; None for all."""
        return self.sliding_window if self.window_attn_skip_freq is None else None

    @property
    def mean_keys(self) -> float:
        """Keys that a token attends to, on average over a sequence and over layers."""
        full = self.seq_length / 2
        windows = [self.window_of(layer) for layer in range(self.num_layers)]
        seen = {
            w: w - w * (w - 1) / (2 * self.seq_length) for w in set(windows) if w is not None and w < self.seq_length
        }
        return sum(full if w is None else seen.get(w, full) for w in windows) / self.num_layers

    @property
    def max_positions(self) -> int:
        """Rows of the learned position table."""
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.seq_length

    @property
    def qkv_bias(self) -> bool:
        """Whether the query-key-value projection has a bias."""
        return self.add_qkv_bias or self.attention_output_bias

    @property
    def attention_output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return not self.disable_bias_linear if self.attention_bias is None else self.attention_bias
