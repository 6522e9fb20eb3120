"""The part of a GPT that one pipeline stage runs: embedding, layers, head, as far as the stage has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.attention import AttentionInputs, document_mask
from megatron_samoe.models.layer_layout import StagePlan
from megatron_samoe.models.norms import Norm
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.expert_pool import Combination
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_samoe.tensor_parallel.layers import (
    Init,
    VocabParallelEmbedding,
    new_parameter,
    padded_vocab_size,
    token_wise_spec,
)
from megatron_samoe.tensor_parallel.random import recompute


class Embedding(nn.Module):
    """Token embedding plus learned positions, where the model has them.

    Args:
        words_only: hold only the token embedding, as the last stage of a pipeline does that shares it with the first.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int, state: ParallelState, dtype: torch.dtype,
                 words_only: bool = False):  # fmt: skip
        super().__init__()
        self.state = state
        model = config.model
        init = Init(std=model.init_method_std)
        padded = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by)
        family = "dense" if model.untie_embeddings_and_output_weights else "embedding"
        self.word = VocabParallelEmbedding(
            vocab_size, padded, model.hidden_size, init=init, state=state, dtype=dtype, family=family
        )
        self.position = None
        if model.position_embedding_type == "learned_absolute" and not words_only:
            shape = (model.max_positions, model.hidden_size)
            self.position = new_parameter(shape, token_wise_spec(state), init, state, dtype)
        self.dropout = model.hidden_dropout

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, context: ForwardContext) -> Tensor:
        """Returns x_TH, with sequence parallelism this rank's share of tokens."""
        x_TH = self.word(tokens_BS.flatten())
        part, parts = (self.state.tp.rank, self.state.tp.size) if self.state.sequence_parallel else (0, 1)
        if self.position is not None:
            x_TH = x_TH + F.embedding(positions_BS.flatten().chunk(parts)[part], self.position)
        if context.training and self.dropout:
            assert context.random is not None
            x_TH = context.random.dropout(x_TH, self.dropout, -1, "embedding", part, parts)
        return x_TH


class GPTStage(nn.Module):
    """A run of layers, with the embedding before the first and the head after the last.

    Layers are named by their index in the whole model, so that parameter names do not depend on the layout.
    """

    def __init__(self, config: PretrainConfig, plan: StagePlan, num_moe_layers: int, vocab_size: int,
                 state: ParallelState, dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.config, self.state = config, state
        self.is_first, self.is_last = plan.has_embedding, plan.has_head
        tied = not config.model.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and tied):
            self.embedding = Embedding(config, vocab_size, state, dtype, words_only=not self.is_first)
        self.layers = nn.ModuleDict(
            {str(place.index): TransformerLayer(config, place, num_moe_layers, state, dtype) for place in plan.layers}
        )
        if self.is_last:
            model = config.model
            self.final_norm = Norm(model, model.hidden_size, state, dtype)
            if model.untie_embeddings_and_output_weights:
                padded = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by)
                self.output = VocabParallelEmbedding(
                    vocab_size,
                    padded,
                    model.hidden_size,
                    init=Init(std=model.init_method_std),
                    state=state,
                    dtype=dtype,
                )

    def forward(
        self, x: Tensor, context: ForwardContext, pool: Combination | None, positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[MoEStats]]:  # fmt: skip
        """Returns the stage's output and the statistics of its MoE layers.

        Args:
            x: tokens_BS for the first stage, x_TH for others.
            positions_BS: position of each token; 0, 1, ... if not given.
            document_ids_BS: where given, no token looks into another document.

        Returns:
            The last stage gives logits [T, this rank's part of the vocabulary], others x_TH.
        """
        batch = context.batch_size
        if positions_BS is None:
            parts = self.state.tp.size if self.state.sequence_parallel and not self.is_first else 1
            tokens = x.numel() if self.is_first else x.shape[0] * parts
            positions_BS = torch.arange(tokens // batch, device=x.device).expand(batch, -1)
        if self.is_first:
            x = self.embedding(x, positions_BS, context)
        uses_rotary = self.config.model.position_embedding_type == "rope"
        inputs = AttentionInputs(
            rotary=rotary_tables(self.config.model, positions_BS, x.dtype) if uses_rotary else None,
            mask_B1SS=None if document_ids_BS is None else document_mask(document_ids_BS),
        )
        all_stats = []
        for number, layer in enumerate(self.layers.values()):
            arguments = (x, inputs, context, pool)
            x, stats = recompute(layer, *arguments) if self._recomputes(number, context) else layer(*arguments)
            if stats is not None:
                all_stats.append(stats)
        return (self._logits(x) if self.is_last else x), all_stats

    def loss(self, logits_TV: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns loss_T, the cross-entropy of each token's label."""
        return vocab_parallel_cross_entropy(logits_TV, labels_BS.flatten(), self._head().first_id, self.state.tp)

    def _head(self) -> VocabParallelEmbedding:
        return self.output if self.config.model.untie_embeddings_and_output_weights else self.embedding.word

    def _logits(self, x_TH: Tensor) -> Tensor:
        return self._head().logits(self.final_norm(x_TH))

    def _recomputes(self, number: int, context: ForwardContext) -> bool:
        training = self.config.training
        limit = training.recompute_num_layers
        return context.training and training.recompute_granularity == "full" and (limit is None or number < limit)
