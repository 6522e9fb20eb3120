"""One step of the training model with a key-value cache: any layout, any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.kv_cache import StepBatch, TorchCache
from megatron_samoe.inference.serving import COMPUTE_DTYPES, Precision, Serving, one_bank
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.experts import without_repeated_bias
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT
from megatron_samoe.moe.sharing.expert_pool import FP32_BYTES, ExpertPool
from megatron_samoe.moe.sharing.mapped import MappedLender, shared_pools
from megatron_samoe.moe.sharing.way import LenderCosts
from megatron_samoe.moe.types import Experts, ForwardContext
from megatron_samoe.ops.grouped_mlp import Counts, ExpertWeights, grouped_mlp
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
        serving: how a pool's experts are kept; "on-the-fly" combines a layer's when it runs. None leaves the model as
            it is.
    """

    steps = "by the training model"

    def __init__(self, loaded: LoadedModel, num_pages: int, serving: Serving | None = None):
        self._loaded, self._model = loaded, loaded.model
        if serving is not None:
            _serve(self._model, serving)
        model_config, state = loaded.config.model, loaded.model.state
        self.device = state.device
        layers = [int(name) for chunk in self._model.chunks for name in chunk.layers]
        kept = (model_config.num_kv_heads // state.tp.size, model_config.head_dim)
        latent = model_config.kv_lora_rank if model_config.multi_latent_attention else None
        self._cache = TorchCache(
            layers, num_pages, *(kept if latent is None else (1, model_config.latent_dim)), self._model.dtype, state.device, latent
        )  # fmt: skip
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
    model.combine_per(model.config.moe.samoe_combine)


@torch.no_grad()
def _serve(model: RankModel, serving: Serving) -> None:
    model.combine_per("step" if serving == "folded" else "layer")
    pool, sets = shared_pools(model.expert_pool)
    layers = {layer.moe.moe_index: layer.moe for layer in model.moe_layers()}
    if isinstance(model.lender, MappedLender):
        own: dict[str, dict[int, MoELayer]] = {}
        for moe_index, moe in layers.items():
            group, place = model.lender.places[moe_index]
            own.setdefault(group, {})[place] = moe
        for group, moes in own.items():
            way, number = (source := model.sources[next(iter(moes.values())).moe_index]).way, source.number
            if way == "scaled" or (way == "combined" and serving == "selected"):
                model.lender.lenders[group] = SelectedLender(
                    sets[number] if way == "scaled" else pool, moes, model.dtype
                )
    elif pool is not None and serving == "selected":
        model.lender = SelectedLender(pool, layers, model.dtype)
    model.begin_step()


class SelectedLender:
    """Lends each layer the experts of the one bank that it takes, as they lie in the pool; see `moe.sharing.way.ExpertLender`."""

    def __init__(self, pool: ExpertPool | None, layers: Mapping[int, MoELayer], dtype: torch.dtype):
        assert pool is not None
        self._pool, self._layers, self._dtype = pool, layers, dtype
        self._weights: dict[str, Tensor] = {}
        self._places: dict[int, tuple[list[int], list[float]]] = {}
        for place, moe in layers.items():
            one = one_bank(moe)
            assert one is not None
            if (one.bank_2E != one.bank_2E[:, :1]).any() or (one.factor_2E != one.factor_2E[:, :1]).any():
                raise ConfigError("serving", "selected", "needs one process where experts of a layer take unlike banks")
            self._places[place] = one.bank_2E[:, 0].tolist(), one.factor_2E[:, 0].tolist()

    def begin_step(self) -> None:
        """Takes in the banks."""
        self._weights = {n: s.whole().to(self._dtype) for n, s in self._pool.stores.items()}

    def finish_step(self) -> None:
        """There are no gradients."""

    def costs(self) -> LenderCosts:
        """Banks in the compute dtype, unless whole ones are used as they are."""
        copies = self._pool.is_sharded or self._dtype.itemsize != FP32_BYTES
        banks = sum(store.num_elements * store.shape[0] for store in self._pool.stores.values())
        return LenderCosts(weights=banks * self._dtype.itemsize if copies else 0)

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts."""
        (bank1, bank2), (factor1, factor2) = self._places[moe_index]
        parts = {n: t[bank1 if ROW_OF_WEIGHT[n] == 0 else bank2] for n, t in self._weights.items()}
        if "b1" in parts:
            parts["b1"] = parts["b1"] * factor1
        weights = without_repeated_bias(ExpertWeights(**parts), self._layers[moe_index].state)
        activation = self._pool.activation

        def run(x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
            # factor1 (W1 x + b1) = W1 (factor1 x) + factor1 b1
            return grouped_mlp(x_RH * factor1, rows_per_expert, weights, activation) * factor2

        return run


def _whole_vocabulary(logits_Nv: Tensor, model: RankModel) -> Tensor:
    """Returns the logits of all tensor-parallel ranks, which hold equal parts of the padded vocabulary."""
    tp = model.state.tp
    if tp.size == 1:
        return logits_Nv[:, : model.vocab_size]
    padded = padded_vocab_size(model.vocab_size, model.config.model.make_vocab_size_divisible_by)
    parts_vN = F.pad(logits_Nv, (0, padded // tp.size - logits_Nv.shape[1])).t()
    return tp.all_gather(parts_vN)[: model.vocab_size].t()
