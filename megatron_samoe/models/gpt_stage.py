"""The part of a GPT that one pipeline stage runs: layers, with embedding or head where the stage has them."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.blueprint import Blueprint
from megatron_samoe.models.layer_layout import StagePlan
from megatron_samoe.models.norms import Norm
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.set_loads import turn_around
from megatron_samoe.moe.sharing.way import ExpertLender
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.ops.document_attention import Documents
from megatron_samoe.parallel_state.parameter_tag import Init, ParameterTag
from megatron_samoe.tensor_parallel.cross_entropy import (
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
)
from megatron_samoe.tensor_parallel.layers import (
    VocabParallelEmbedding,
    new_parameter,
    padded_vocab_size,
    token_wise_spec,
)
from megatron_samoe.tensor_parallel.mappings import enter_tensor_parallel_region
from megatron_samoe.tensor_parallel.random import recompute


class Embedding(nn.Module):
    """The token embedding, plus learned positions where the model has them.

    Args:
        words_only: hold only the token embedding, as the last stage does when it shares that with the first.
    """

    def __init__(self, blueprint: Blueprint, words_only: bool = False):
        super().__init__()
        model, state = blueprint.config.model, blueprint.state
        self.state = state
        self.word = _words(blueprint, "dense" if model.untie_embeddings_and_output_weights else "embedding")
        self.position = None
        if model.position_embedding_type == "learned_absolute" and not words_only:
            shape = (model.max_positions, model.hidden_size)
            tag = ParameterTag(token_wise_spec(state), Init(std=model.init_method_std))
            self.position = new_parameter(shape, tag, state, blueprint.dtype)
        self.dropout, self.multiplier = model.hidden_dropout, model.embedding_multiplier

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, context: ForwardContext) -> Tensor:
        """Returns x_TH, with sequence parallelism this rank's share of tokens."""
        x_TH = self.word(tokens_BS.flatten())
        if self.multiplier != 1.0:
            x_TH = x_TH * self.multiplier
        part, parts = (self.state.tp.rank, self.state.tp.size) if self.state.sequence_parallel else (0, 1)
        if self.position is not None:
            x_TH = x_TH + F.embedding(positions_BS.flatten().chunk(parts)[part], self.position)
        if context.training and self.dropout:
            assert context.random is not None
            x_TH = context.random.dropout(x_TH, self.dropout, -1, "embedding", self.state.token_share)
        return x_TH


class GPTStage(nn.Module):
    """Consecutive layers, with the embedding before the first and the head after the last.

    Layers are named by their index in the full model, so that parameter names do not depend on the layout.
    """

    layers: Any  # torch's containers forget what they hold

    def __init__(self, blueprint: Blueprint, plan: StagePlan):
        super().__init__()
        config, state = blueprint.config, blueprint.state
        self.config, self.state = config, state
        self.is_first, self.is_last = plan.has_embedding, plan.has_head
        self.set_loads = blueprint.set_loads
        tied = not config.model.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and tied):
            self.embedding = Embedding(blueprint, words_only=not self.is_first)
        self.layers = nn.ModuleDict({str(spec.index): TransformerLayer(blueprint, spec) for spec in plan.layers})
        if self.is_last:
            self.final_norm = Norm(config.model, config.model.hidden_size, state, blueprint.dtype)
            if not tied:
                self.output = _words(blueprint, "dense")

    def forward(
        self,
        x: Tensor,
        context: ForwardContext,
        lender: ExpertLender,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[MoEStats]]:
        """Returns the stage's output and the statistics of its MoE layers.

        Args:
            x: tokens_BS for the first stage, x_TH for others; with context parallelism, as all that has a value for each
                token, this rank's part of sequences (`TokenShare`). While training, rows with the loads of shared sets follow
                where loads are balanced over a set's layers (`set_loads`).
            positions_BS: position of each token; those in complete sequences if not given.
            document_ids_BS: of complete sequences, on the host; where given, no token attends to another document.

        Returns:
            logits [T, this rank's part of the padded vocabulary] on the last stage, -inf for padding, or, where the context
            fuses the loss, what they are made of, for `loss`; and the next stage's x
            on others.
        """
        batch = context.batch_size
        set_loads = self.set_loads if context.training else None
        loads_BC = None
        if set_loads is not None and not self.is_first:
            x, loads_BC = set_loads.unpack(x, batch)
        if positions_BS is None:
            parts = self.state.tp.size if self.state.sequence_parallel and not self.is_first else 1
            tokens = x.numel() if self.is_first else x.shape[0] * parts
            positions = torch.arange(tokens // batch * self.state.cp.size, device=x.device)
            positions_BS = self.state.token_share.of_sequences(positions[None]).expand(batch, -1)
        if self.is_first:
            x = self.embedding(x, positions_BS, context)
            loads_BC = None if set_loads is None else set_loads.zeros(batch, x)
        uses_rotary = self.config.model.position_embedding_type == "rope"
        inputs = AttentionInputs(
            rotary=rotary_tables(self.config.model, positions_BS, x.dtype) if uses_rotary else None,
            documents=None if document_ids_BS is None else Documents(document_ids_BS, x.device),
        )
        all_stats = []
        recomputed = recomputed_layers(self.config) if context.training else 0
        for number, layer in enumerate(self.layers.values()):
            arguments = (x, inputs, context, lender, loads_BC)
            x, stats, loads_BC = recompute(layer, *arguments) if number < recomputed else layer(*arguments)
            if stats is not None:
                all_stats.append(stats)
        if set_loads is not None and loads_BC is not None:
            x = turn_around(x, loads_BC) if self.is_last else set_loads.pack(x, loads_BC)
        if not self.is_last:
            return x, all_stats
        normed_TH = self._normed(x)
        if context.fuses_loss:
            return normed_TH, all_stats
        return self._head().logits(normed_TH, self.config.model.final_logit_softcapping), all_stats

    def loss(self, y: Tensor, labels_BS: Tensor, fuses_loss: bool = False) -> Tensor:
        """Returns loss_T, the cross-entropy of each token's label, from what `forward` returned.

        Args:
            fuses_loss: as in the context of the forward pass.
        """
        head, labels_T, tp = self._head(), labels_BS.flatten(), self.state.tp
        if not fuses_loss:
            return vocab_parallel_cross_entropy(y, labels_T, head.first_id, tp)
        return linear_cross_entropy(
            enter_tensor_parallel_region(y, self.state),
            head.weight[: head.width],
            head.num_used_rows,
            labels_T,
            head.first_id,
            tp,
            self.config.model.final_logit_softcapping,
        )

    def _head(self) -> VocabParallelEmbedding:
        return self.output if self.config.model.untie_embeddings_and_output_weights else self.embedding.word

    def _normed(self, x_TH: Tensor) -> Tensor:
        scaling, normed_TH = self.config.model.logits_scaling, self.final_norm(x_TH)
        return normed_TH if scaling == 1.0 else normed_TH / scaling  # fewer numbers than logits

    def head_width(self) -> int:
        """Returns the columns of this rank's logits."""
        return self._head().width


def _words(blueprint: Blueprint, family: Literal["dense", "embedding"]) -> VocabParallelEmbedding:
    model = blueprint.config.model
    padded = padded_vocab_size(blueprint.vocab_size, model.make_vocab_size_divisible_by)
    return VocabParallelEmbedding(
        blueprint.vocab_size,
        padded,
        model.hidden_size,
        init=Init(std=model.init_method_std),
        state=blueprint.state,
        dtype=blueprint.dtype,
        family=family,
    )


def recomputed_layers(config: PretrainConfig) -> int:
    """Returns how many first layers of a stage, at most, keep only their input and are recomputed."""
    training = config.training
    if training.recompute_granularity != "full":
        return 0
    return training.recompute_num_layers or config.model.num_layers
