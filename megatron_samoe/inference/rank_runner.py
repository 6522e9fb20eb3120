"""One step of the training model with a key-value cache: any layout, any device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.inference.kv_cache import StepBatch, TorchCache
from megatron_samoe.inference.load import LoadedModel
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.pipeline_parallel.p2p_communication import TensorSpec
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.pipeline_parallel.schedules import run_plan


class Runner(Protocol):
    """Computes the steps of an engine; holds the keys and values of all its sequences."""

    device: torch.device

    def run(self, batch: StepBatch) -> Tensor:
        """Returns fp32 logits [wanted rows, V] on the CPU, and keeps the tokens' keys and values."""
        ...


class RankRunner:
    """Runs the ranks' model; all ranks call it together with the same batches and get the same logits."""

    def __init__(self, loaded: LoadedModel, num_pages: int):
        self._loaded, self._model = loaded, loaded.model
        model_config, state = loaded.config.model, loaded.model.state
        self.device = state.device
        layers = [int(name) for chunk in self._model.chunks for name in chunk.layers]
        self._cache = TorchCache(
            layers, num_pages, model_config.num_kv_heads // state.tp.size, model_config.head_dim, self._model.dtype,
            state.device,
        )  # fmt: skip
        self._context = ForwardContext(batch_size=1, cache=self._cache)

    @torch.no_grad()
    def run(self, batch: StepBatch) -> Tensor:
        """See `Runner.run`."""
        model, state = self._model, self._model.state
        self._cache.begin(batch)
        # Tensor-parallel ranks may share tokens out evenly; what fills up belongs to no sequence.
        missing = -batch.num_tokens % state.tp.size
        tokens_BS = torch.cat((batch.tokens_T, batch.tokens_T.new_zeros(missing)))[None]
        positions_BS = torch.cat((batch.positions_T, batch.positions_T.new_zeros(missing))).long()[None]
        rows = torch.tensor(batch.logit_rows, dtype=torch.int64, device=self.device)
        logits_NV = torch.zeros(len(rows), model.vocab_size, device=self.device)

        def forward(chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
            y, _ = model(tokens_BS if x is None else x, self._context, positions_BS, chunk=chunk)
            if model.chunks[chunk].is_last and len(rows):
                logits_NV.copy_(_whole_vocabulary(y[rows].float(), self._loaded))
            return y

        spec = TensorSpec((tokens_BS.numel(), self._loaded.config.model.hidden_size), model.dtype, self.device)
        pipeline = self._loaded.pipeline
        run_plan(forward_plan(pipeline.num_chunks, 1), pipeline, forward, spec)
        return state.pp.all_reduce(logits_NV).cpu()


def _whole_vocabulary(logits_Nv: Tensor, loaded: LoadedModel) -> Tensor:
    """Returns the logits of all tensor-parallel ranks; parts differ in width, so they are padded to travel."""
    tp = loaded.model.state.tp
    if tp.size == 1:
        return logits_Nv
    widths = tp.all_gather(torch.tensor([logits_Nv.shape[1]], device=logits_Nv.device)).tolist()
    padded = logits_Nv.new_full((1, logits_Nv.shape[0], max(widths)), -torch.inf)
    padded[0, :, : logits_Nv.shape[1]] = logits_Nv
    parts = tp.all_gather(padded)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
