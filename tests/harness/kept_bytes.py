"""What autograd keeps of a layer until its backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.moe.sharing.mapped import MappedLender
from megatron_samoe.moe.sharing.way import ExpertLender
from megatron_samoe.moe.types import ForwardContext


def lent_tensors(lender: ExpertLender, parts: Sequence[str] = ("_weights", "_grads")) -> list[torch.Tensor]:
    """Returns the expert weights and gradients that the lenders of a model keep."""
    assert isinstance(lender, MappedLender)
    kept = (getattr(one, part, None) for one in lender.lenders.values() for part in parts)
    return [t for weights in kept if weights is not None for _, t in weights.items()]


def kept_by_autograd(model: RankModel, config: PretrainConfig) -> int:
    """Returns the bytes of all tensors that the first layer's forward pass keeps, weights left out."""
    batch, length, hidden = config.training.micro_batch_size, config.model.seq_length, config.model.hidden_size
    buffers = GradBuffers(model.global_parameters(), model.state)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *(b.flat for b in buffers.buffers)]}
    model.begin_step()
    own |= {t.untyped_storage().data_ptr() for t in lent_tensors(model.lender, ["_weights"])}
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    context = ForwardContext(batch, training=True, tokens_per_step=batch * length)
    share = model.state.token_share
    positions_BS = share.of_sequences(torch.arange(length)[None]).expand(batch, -1)
    rotary = (
        rotary_tables(config.model, positions_BS, model.dtype)
        if config.model.position_embedding_type == "rope"
        else None
    )
    x_TH = torch.randn(batch * length // share.num_shares, hidden, dtype=model.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y_TH, *_ = model.chunks[0].layers["0"](x_TH, AttentionInputs(rotary=rotary), context, model.lender)
    assert y_TH.requires_grad
    if rotary is not None:
        for table in rotary:  # all layers share them
            kept.pop(table.untyped_storage().data_ptr(), None)
    return sum(kept.values())
