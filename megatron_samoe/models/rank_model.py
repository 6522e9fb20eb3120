"""The model of one rank: its stages, and its part of the experts that MoE layers share."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.models.blueprint import Blueprint, ModelParts
from megatron_samoe.models.gpt_stage import GPTStage
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.layer_layout import rank_plans
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.candidates import candidate_schedule
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.sharing.way import ExpertLender, Mixture
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.parallel_state.state import ParallelState

#: What checkpoints, which are older than some words here, know parameters as.
STORED_NAMES = (
    (re.compile(r"^chunks\.\d+\."), ""),
    (re.compile(r"\.moe\.experts\.coefficients$"), ".moe.combination"),
    (re.compile(r"^expert_pool\.combined\."), "expert_pool."),
    (re.compile(r"^(expert_pool\.set\.\d+)\.bank\."), r"\1."),
)


def stored_name(name: str) -> str:
    """Returns a parameter's global name: the same in every layout, and in every checkpoint."""
    for pattern, replacement in STORED_NAMES:
        name = pattern.sub(replacement, name)
    return name


class RankModel(nn.Module):
    """The rank's chunks (one, or several with virtual pipeline stages) and the experts that their MoE layers share.

    The model owns shared experts and lends them to its layers in every call. If every layer held them, they would be
    in `state_dict()` many times, and their gradient would be reduced before all layers have added theirs.
    """

    chunks: Any  # torch's containers forget what they hold

    def __init__(
        self,
        config: PretrainConfig,
        vocab_size: int,
        state: ParallelState,
        dtype: torch.dtype,
        parts: ModelParts | None = None,
    ):
        super().__init__()
        self.config, self.state, self.vocab_size, self.dtype = config, state, vocab_size, dtype
        self.parts = parts or ModelParts()
        blueprint = Blueprint(config, vocab_size, state, dtype, self.parts)
        #: Routed experts of each MoE layer of the full model.
        self.num_experts = tuple(shape.num_experts for shape in blueprint.expert_shapes)
        self.statistics, self.set_loads = blueprint.statistics, blueprint.set_loads
        #: Where the experts of each MoE layer of the full model come from.
        self.sources = blueprint.sharing_context.sources
        self.chunks = nn.ModuleList(GPTStage(blueprint, plan) for plan in rank_plans(config, state.pp.rank))
        self.expert_pool = blueprint.sharing.shared_part()
        self.lend_for(None)
        self._refuse_unsaved()

    def _refuse_unsaved(self) -> None:
        """Raises TypeError where a part from outside keeps state that checkpoints, which hold parameters, would not hold."""
        if unsaved := sorted(
            set(self.state_dict()) - {name for name, _ in self.named_parameters(remove_duplicate=False)}
        ):
            raise TypeError(
                f"{', '.join(unsaved)} would not be in checkpoints; make it a parameter that needs no gradient "
                "(new_parameter, requires_grad_(False)), or a buffer with persistent=False if it is computed anew"
            )

    def lend_for(self, serving: Literal["folded", "on-the-fly", "selected"] | None) -> None:
        """Lends experts as a way of serving does from now on; None: as for training."""
        context = Blueprint(self.config, self.vocab_size, self.state, self.dtype, self.parts).sharing_context
        self._sharing = self.parts.sharing(replace(context, serving=serving))
        layer_parts = {layer.moe.moe_index: layer.moe.experts for layer in self.moe_layers()}
        self.lender: ExpertLender = self._sharing.lender(layer_parts, self.expert_pool)

    def mixture(self, moe: MoELayer) -> Mixture:
        """Returns what the experts of one of this rank's layers are made of."""
        return self._sharing.mixture(moe.moe_index, moe.experts, self.expert_pool)

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the full model."""
        return len(self.num_experts)

    def moe_layers(self) -> list[TransformerLayer]:
        """Returns this rank's MoE layers in order."""
        return [layer for chunk in self.chunks for layer in chunk.layers.values() if layer.is_moe]

    def global_parameters(self) -> dict[str, nn.Parameter]:
        """Returns this rank's parameters under names that are the same in every layout."""
        return {stored_name(name): p for name, p in self.named_parameters()}

    def begin_step(self) -> None:
        """Prepares shared experts from their current weights. Call it after the weights change and before a forward
        pass.
        """
        self.lender.begin_step()

    def finish_step(self) -> None:
        """Completes this rank's gradients of shared experts. `finalize_model_grads` calls it before gradients are
        reduced.
        """
        self.lender.finish_step()

    def balanced_counts(self, counts_LE: Tensor) -> list[Tensor]:
        """Returns for each MoE layer of the full model the mean loads to balance: the layer's own, or its set's over
        all layers that use it.
        """
        own = [counts_E[:n] for counts_E, n in zip(counts_LE, self.num_experts, strict=True)]
        if self.set_loads is None:
            return own
        sums: dict[ExpertSource, Tensor] = {}
        for source, counts_E in zip(self.sources, own, strict=True):
            sums[source] = sums[source] + counts_E if source in sums else counts_E
        columns = self.set_loads.columns
        return [
            c if at is None else sums[s] / at.num_layers for s, c, at in zip(self.sources, own, columns, strict=True)
        ]

    @torch.no_grad()
    def after_step(self, counts_LE: Tensor, iteration: int, num_tokens: int, votes_LE: Tensor) -> Tensor | None:
        """Updates routers from the loads of a global batch, after the optimizer has updated the weights. Ranks call it
        together.

        Args:
            iteration: number of steps done, including this one.
            num_tokens: of the batch.
            counts_LE: tokens that chose each expert, of all MoE layers of the full model, on the model's device.
            votes_LE: what the lock of a pool finds owners by; see `CandidateSchedule.update`.

        Returns:
            order_E, the expert that each index is to have from now on where the lock of a pool moves experts, for
            `MixedPrecisionOptimizer.reorder_experts`; else None.
        """
        balanced = self.balanced_counts(counts_LE)
        visited = counts_LE.sum() / (len(counts_LE) * num_tokens)
        routers = {layer.moe.moe_index: layer.moe.router for layer in self.moe_layers()}
        for moe_index, router in routers.items():
            router.after_step(balanced[moe_index], visited)
        schedule = candidate_schedule(self.config.moe)
        if schedule is None:
            return None
        factors_E = {i: router.candidates for i, router in routers.items()}
        return schedule.update(factors_E, votes_LE, iteration, self.state)

    def expert_dims(self) -> dict[str, int]:
        """Returns the experts' dim of each of the rank's parameters that has one, by global name, where all layers choose
        from one pool."""
        dims = {}
        for name, p in self.global_parameters().items():
            if tag_of(p).is_routed_expert:
                dims[name] = next(dim for dim, axis in tag_of(p).shard.partition if axis == "ep")
            elif name.rpartition(".moe.router.")[2] in self.parts.router.by_expert:
                dims[name] = 0
        return dims

    def forward(
        self,
        x: Tensor,
        context: ForwardContext,
        positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        chunk: int = 0,
    ) -> tuple[Tensor, list[MoEStats]]:
        """Returns a chunk's output and the statistics of its MoE layers; see `GPTStage.forward`."""
        return self.chunks[chunk](x, context, self.lender, positions_BS, document_ids_BS)

    def loss(self, y: Tensor, labels_BS: Tensor, fuses_loss: bool = False) -> Tensor:
        """Returns loss_T, on the last stage; see `GPTStage.loss`."""
        return self.chunks[-1].loss(y, labels_BS, fuses_loss)


def compute_dtype(config: PretrainConfig) -> torch.dtype:
    """Returns the dtype of weights and activations."""
    return torch.bfloat16 if config.training.bf16 else torch.float16 if config.training.fp16 else torch.float32


def build_model(
    config: PretrainConfig,
    vocab_size: int,
    state: ParallelState,
    dtype: torch.dtype | None = None,
    parts: ModelParts | None = None,
) -> RankModel:
    """Returns this rank's model with initial weights.

    Args:
        vocab_size: number of tokens, before padding.
        dtype: of weights and activations; the configured precision if not given.
        parts: parts that replace the package's own.
    """
    model = RankModel(config, vocab_size, state, dtype or compute_dtype(config), parts)
    initialize_parameters(model.global_parameters(), state, config.training.seed)
    return model
