"""One step of the training model with a key-value cache: any layout, any device."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.kv_cache import StepBatch, TorchCache
from megatron_samoe.inference.serving import COMPUTE_DTYPES, Precision, Serving
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.pipeline_parallel.p2p_communication import TensorSpec
from megatron_samoe.pipeline_parallel.schedule_plan import forward_plan
from megatron_samoe.pipeline_parallel.schedules import run_plan
from megatron_samoe.runtime.load import LoadedModel
from megatron_samoe.tensor_parallel.layers import padded_vocab_size


class Runner(Protocol):
    """Computes the steps of an engine; holds the keys and values of all its sequences.

    Attributes:
        steps: how they are computed, in words.
    """

    device: torch.device
    steps: str

    def run(self, batch: StepBatch) -> Tensor:
        """Returns fp32 logits [wanted rows, V] on the CPU, valid until the next step, and keeps keys and values."""
        ...


class RankRunner:
    """Runs the ranks' model; all ranks call it together with the same batches and get the same logits.

    Args:
        serving: how a pool's experts are kept; "on-the-fly" combines a layer's when it runs.
    """

    steps = "by the training model"

    def __init__(self, loaded: LoadedModel, num_pages: int, serving: Serving):
        self._loaded, self._model = loaded, loaded.model
        assert serving != "auto"
        self._model.lend_for(serving)
        with torch.no_grad():
            self._model.begin_step()
        model_config, state = loaded.config.model, loaded.model.state
        self.device = state.device
        layers = [int(name) for chunk in self._model.chunks for name in chunk.layers]
        kept = (model_config.num_kv_heads // state.tp.size, model_config.head_dim)
        latent = model_config.kv_lora_rank if model_config.multi_latent_attention else None
        self._cache = TorchCache(
            layers,
            num_pages,
            *(kept if latent is None else (1, model_config.latent_dim)),
            self._model.dtype,
            state.device,
            latent,
        )
        self._context = ForwardContext(batch_size=1, cache=self._cache)

    @torch.no_grad()
    def run(self, batch: StepBatch) -> Tensor:
        """See `Runner.run`."""
        model, state = self._model, self._model.state
        self._cache.begin(batch)
        # Sequence parallelism splits tokens evenly; what fills up belongs to no sequence.
        missing = -batch.num_tokens % state.tp.size
        tokens_BS = torch.cat((batch.tokens_T, batch.tokens_T.new_zeros(missing)))[None]
        positions_BS = torch.cat((batch.positions_T, batch.positions_T.new_zeros(missing))).long()[None]
        rows = torch.tensor(batch.logit_rows, dtype=torch.int64, device=self.device)
        logits_NV = torch.zeros(len(rows), model.vocab_size, device=self.device)

        def forward(chunk: int, micro_batch: int, x: Tensor | None) -> Tensor:
            y, _ = model(tokens_BS if x is None else x, self._context, positions_BS, chunk=chunk)
            if model.chunks[chunk].is_last and len(rows):
                logits_NV.copy_(_whole_vocabulary(y[rows].float(), model))
            return y

        spec = TensorSpec((tokens_BS.numel(), self._loaded.config.model.hidden_size), model.dtype, self.device)
        pipeline = self._loaded.pipeline
        run_plan(forward_plan(pipeline.num_chunks, 1), pipeline, forward, spec)
        return state.pp.all_reduce(logits_NV).cpu()


def convert_weights(model: RankModel, dtype: Precision) -> None:
    """Turns a model's weights and activations into another precision, in place; routers and shared experts stay fp32.

    Raises:
        ConfigError: int8, which the training model does not compute in.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ConfigError("dtype", dtype, "fp32 or bf16 where several ranks serve a model")
    wanted = COMPUTE_DTYPES[dtype]
    if wanted == model.dtype:
        return
    for name, parameter in model.named_parameters():
        kept = name.startswith("expert_pool") or any(word in name for word in ("router", "mixing", "coefficients"))
        if parameter.dtype == model.dtype and not kept:
            parameter.data = parameter.data.to(wanted)
    model.dtype = wanted
    model.lend_for(None)


def _whole_vocabulary(logits_Nv: Tensor, model: RankModel) -> Tensor:
    """Returns the logits of all tensor-parallel ranks, which hold equal parts of the padded vocabulary."""
    tp = model.state.tp
    if tp.size == 1:
        return logits_Nv[:, : model.vocab_size]
    padded = padded_vocab_size(model.vocab_size, model.config.model.make_vocab_size_divisible_by)
    parts_vN = F.pad(logits_Nv, (0, padded // tp.size - logits_Nv.shape[1])).t()
    return tp.all_gather(parts_vN)[: model.vocab_size].t()
