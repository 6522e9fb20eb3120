"""A model's logits, computed by the ranks of any layout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import ParallelState
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.pipeline_parallel.schedules import run_plan
from megatron_samoe.tensor_parallel.mappings import gather_sequences
from megatron_samoe.training.setup import TrainSetup, build_setup
from tests.harness.tiny import VOCAB_SIZE, global_batch


@torch.no_grad()
def logits_of(setup: TrainSetup) -> Tensor:
    """Returns logits [T, V] of a batch, computed in fp32 by a model of the same layout with the run's weights."""
    config = replace(setup.config, training=replace(setup.config.training, bf16=False))
    wide = build_setup(config, VOCAB_SIZE, setup.parallel)
    ours = setup.model.global_parameters()
    for name, parameter in wide.model.global_parameters().items():
        parameter.data.copy_(ours[name])
    wide.model.begin_step()
    whole_BS = global_batch(config, 99, batch_size=2)["tokens"]
    result = torch.zeros(whole_BS.numel(), VOCAB_SIZE)
    tokens_BS = setup.parallel.token_share.of_sequences(whole_BS)

    def forward(chunk: int, _micro_batch: int, x: Tensor | None) -> Tensor:
        y, _ = wide.model(tokens_BS if x is None else x, ForwardContext(batch_size=2), chunk=chunk)
        if wide.model.chunks[chunk].is_last:
            result.copy_(gather_sequences(_whole_vocabulary(y, setup.parallel), setup.parallel, 2))
        return y

    run_plan(forward_plan(len(wide.model.chunks), 1), wide.pipeline, forward, wide.boundary(2))
    return setup.parallel.pp.all_reduce(result)


def _whole_vocabulary(logits_Tv: Tensor, parallel: ParallelState) -> Tensor:
    """Returns [T, V] of ranks' parts, of which some may be empty and one ends with padding."""
    width = -(-VOCAB_SIZE // parallel.tp.size) + 8
    padded = logits_Tv.new_full((1, len(logits_Tv), width), torch.nan)
    padded[0, :, : logits_Tv.shape[1]] = logits_Tv
    parts = [part[:, ~part[0].isnan()] for part in parallel.tp.all_gather(padded)]
    return torch.cat(parts, 1)[:, :VOCAB_SIZE]
