"""Split layers against their whole twins, and what padding of the vocabulary must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config import ParallelConfig
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.parallel_state import ParallelState, initialize_model_parallel, single_process_state
from megatron_samoe.parallel_state.parameter_tag import Init, tag_of
from megatron_samoe.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    padded_vocab_size,
)
from megatron_samoe.tensor_parallel.mappings import gather_tokens, scatter_tokens
from tests.harness.ranks import run_ranks
from tests.harness.tiny import gather_global

H, FFN, T, VOCAB, PADDED = 6, 8, 12, 9, 16
INIT = Init(std=0.3)


class Model(nn.Module):
    """Embedding, gated column-parallel, row-parallel, tied output: the borders that a transformer has."""

    def __init__(self, state: ParallelState, bias: bool):
        super().__init__()
        self.state = state
        made: dict[str, Any] = {"init": INIT, "state": state, "dtype": torch.float64}
        self.embedding = VocabParallelEmbedding(VOCAB, PADDED, H, **made)
        self.column = ColumnParallelLinear(H, (2, FFN), 1, bias=bias, **made)
        self.row = RowParallelLinear(FFN, H, bias=bias, **made)
        initialize_parameters(dict(self.named_parameters()), state, 7)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(p, 0.25)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        gate, up = self.column(x).chunk(2, -1)
        x = x + self.row(gate.sigmoid() * up)
        x = gather_tokens(scatter_tokens(x, self.state.tp).square(), self.state.tp)
        return self.embedding.logits(x)[:, : self.embedding.num_used_rows]


def ids() -> Tensor:
    return torch.arange(T) % VOCAB


def train(bias: bool) -> dict[str, Any]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    state = initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=world))
    model = Model(state, bias)
    logits = model(ids())
    columns = torch.arange(VOCAB)[model.embedding.first_id :][: logits.shape[1]]
    weights = torch.randn(T, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights[:, columns]).sum().backward()
    named = dict(model.named_parameters())
    return {
        "logits": torch.cat(state.tp.all_gather_object(logits.detach()), 1),
        "weights": gather_global({n: sharded(p, tag_of(p).shard, state) for n, p in named.items()}, state),
        "grads": gather_global({n: sharded(p.grad, tag_of(p).shard, state) for n, p in named.items()}, state),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("bias", [True, False])
def test_split_layers_equal_whole_ones(bias: bool) -> None:
    whole = train(bias)
    for world in (2, 4):
        split = run_ranks(train, world, bias)[0]
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-13)
        assert all(torch.equal(split["weights"][n], w) for n, w in whole["weights"].items())


def test_one_rank_equals_plain_torch() -> None:
    model = Model(single_process_state(), bias=True)
    table, column, row = model.embedding.weight, model.column, model.row
    x = table[ids()]
    h = F.linear(x, column.weight.reshape(2 * FFN, H), column.bias.reshape(-1))
    x = x + F.linear(h[:, :FFN].sigmoid() * h[:, FFN:], row.weight, row.bias)
    torch.testing.assert_close(model(ids()), x.square() @ table[:VOCAB].T, rtol=1e-12, atol=1e-13)


def used_rows() -> tuple[int, int, tuple[int, ...]]:
    state = initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=4))
    embedding = VocabParallelEmbedding(VOCAB, PADDED, H, init=INIT, state=state, dtype=torch.float32)
    with torch.no_grad():
        embedding.weight.fill_(1.0)
    return embedding.first_id, embedding.num_used_rows, tuple(embedding.logits(torch.ones(2, H)).shape)


@pytest.mark.distributed
def test_ranks_with_nothing_but_padding_have_no_logits() -> None:
    assert run_ranks(used_rows, 4) == [(0, 4, (2, 4)), (4, 4, (2, 4)), (8, 1, (2, 4)), (12, 0, (2, 0))]


def test_padding_takes_no_probability_and_no_gradient() -> None:
    """Whatever stands in the padded rows, and however many there are, the loss is the same."""
    losses = []
    for padded in (VOCAB, PADDED, 64):
        embedding = VocabParallelEmbedding(
            VOCAB, padded, H, init=INIT, state=single_process_state(), dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            embedding.weight[:VOCAB] = torch.randn(VOCAB, H, generator=generator, dtype=torch.float64)
            embedding.weight[VOCAB:] = 1e3
        x = torch.randn(T, H, generator=generator, dtype=torch.float64)
        logits = embedding.logits(x)
        assert logits.shape == (T, padded) and logits.is_contiguous(), "no product has an odd width"
        assert logits[:, :VOCAB].isfinite().all() and (logits[:, VOCAB:] == -torch.inf).all()
        loss = F.cross_entropy(logits, ids())
        loss.backward()
        losses.append(loss.item())
        assert embedding.weight.grad is not None
        assert not embedding.weight.grad[VOCAB:].any()
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(("size", "by", "padded"), [(100, 128, 128), (128, 128, 128), (129, 128, 256), (7, 1, 7)])
def test_padded_vocab_size(size: int, by: int, padded: int) -> None:
    assert padded_vocab_size(size, by) == padded


def test_parameters_are_tagged_with_their_dims() -> None:
    model = Model(single_process_state(), bias=True)
    partitions = {name: tag_of(p).shard.partition for name, p in model.named_parameters()}
    assert partitions == {
        "embedding.weight": ((0, "tp"),),
        "column.weight": ((1, "tp"),),
        "column.bias": ((1, "tp"),),
        "row.weight": ((1, "tp"),),
        "row.bias": (),
    }
