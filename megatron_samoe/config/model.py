"""The transformer itself: sizes, style, regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Network size and style. The defaults are GPT-3's style; a LLaMA style is a set of flags away."""

    num_layers: int = 8
    """Number of transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream (H)."""
    ffn_hidden_size: int | None = None
    """Width of a dense MLP (F). Derived if not given: 4 H, or 8/3 H rounded to 64 with --swiglu."""
    num_attention_heads: int = 8
    """Number of attention heads (A)."""
    kv_channels: int | None = None
    """Size of one attention head (D). Derived if not given: hidden size / heads."""
    group_query_attention: bool = False
    """Let several query heads share one key-value head."""
    num_query_groups: int = 1
    """Number of key-value heads with --group-query-attention."""
    seq_length: int = 256
    """Tokens of one training sample (S)."""
    max_position_embeddings: int | None = None
    """Longest sequence that learned positions cover. Derived if not given: the sequence length."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How positions enter the model."""
    rotary_base: float = 10000.0
    """Base of the rotary angles."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of the normalisation layers."""
    norm_epsilon: float = 1e-5
    """Added to the variance (LayerNorm) or mean square (RMSNorm)."""
    swiglu: bool = False
    """Gated SiLU MLPs and experts in place of GELU ones."""
    disable_bias_linear: bool = False
    """No bias in linear layers and experts."""
    add_qkv_bias: bool = False
    """Keep the bias of the query-key-value projection with --disable-bias-linear."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own matrix."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head before attention."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections use it divided by sqrt(2 * num_layers)."""
    attention_dropout: float = 0.0
    """Dropout probability of attention weights."""
    hidden_dropout: float = 0.0
    """Dropout probability of embeddings and of each sub-layer's output."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, whatever the layout; the tensor-parallel size must divide it.
    Padding takes no part in the softmax."""

    @property
    def output_init_std(self) -> float:
        """Spread of projections that end on the residual stream (GPT-2: smaller by the root of their number)."""
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
    def max_positions(self) -> int:
        """Rows of the learned position table."""
        return self.max_position_embeddings if self.max_position_embeddings is not None else self.seq_length

    @property
    def qkv_bias(self) -> bool:
        """Whether the query-key-value projection has a bias."""
        return self.add_qkv_bias or not self.disable_bias_linear
