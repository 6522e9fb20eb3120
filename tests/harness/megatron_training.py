"""Steps of a small model by Megatron-Core's own layers, data parallelism, optimizer and schedule, with shared experts."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.harness.megatron_faults import FAULTS
from tests.harness.near_package import SITE
from tests.harness.ranks import run_ranks

VOCABULARY, LENGTH, BATCHES = 64, 16, 4
#: `run_ranks` on ranks that need not import Megatron-Core, which takes five seconds.
run_megatron = functools.partial(
    run_ranks,
    timeout_s=300,
    more=(
        "tests.harness.megatron_on_cpu",  # first
        *(f"megatron.core.{name}" for name in ("models.gpt", "distributed", "optimizer", "dist_checkpointing")),
        "megatron_samoe.plugins.megatron_core",
    ),
)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, and how Megatron-Core trains."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    chunks: int = 1
    zero: bool = False
    overlap: bool = False
    length: int = LENGTH
    options: dict[str, Any] = field(default_factory=dict)


class Norm(nn.Module):
    """An RMSNorm that knows sequence parallelism, as Transformer Engine's and apex's do and torch's does not."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def start(layout: Layout) -> None:
    """Makes Megatron-Core's groups; in a process of one rank the default group as well."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, SITE)
    importlib.import_module("tests.harness.megatron_on_cpu")  # before megatron.core
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        store = os.path.join(tempfile.mkdtemp(), "store")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.chunks if layout.chunks > 1 else None,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1)


def model_config(layout: Layout, kind: Any = None) -> Any:
    """Returns the TransformerConfig of four layers of eight experts, or a configuration of another class."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "num_moe_experts": 8,
        "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall", "add_bias_linear": False,
        "gated_linear_unit": True, "activation_func": nn.functional.silu, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True, "bias_dropout_fusion": False,
        "masked_softmax_fusion": False, "gradient_accumulation_fusion": False, "apply_rope_fusion": False,
        "params_dtype": torch.float32, "pipeline_dtype": torch.float32, "batch_p2p_comm": False,
    }  # fmt: skip
    return (kind or TransformerConfig)(
        **{**options, **layout.options},
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, sequence_parallel=layout.tp > 1,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp,
    )  # fmt: skip


def built(layout: Layout, sharing: str | None, options: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Returns the configuration, the chunks of this rank's model, and what shares their experts; None for Megatron-Core's own."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from megatron_samoe.plugins.megatron_core import ExpertSharing

    config = model_config(layout)
    shares = None if sharing is None else ExpertSharing(config, sharing, **options)
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    if shares is not None:
        spec = shares.spec(spec)
    chunks = []
    for number in range(layout.chunks):
        stage = number if layout.chunks > 1 else None
        count = get_num_layers_to_build(config, vp_stage=stage)
        model = GPTModel(
            config, TransformerBlockSubmodules([spec] * count, Norm), vocab_size=VOCABULARY, max_sequence_length=layout.length,
            position_embedding_type="rope", share_embeddings_and_output_weights=False,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage), vp_stage=stage,
        )  # fmt: skip
        chunks.append(model if shares is None else shares.attach(model))
    return config, chunks, shares


def fill(chunks: list[Any]) -> None:
    """Draws what Megatron-Core owns by global names, so that every layout begins with the same model."""
    from megatron.core import parallel_state

    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, parameter in chunk.named_parameters():
            if "expert_pool" in name or ".experts.part." in name:
                continue
            words = name.split(".")
            if "layers" in words:
                at = words.index("layers") + 1
                words[at] = str(int(words[at]) + first)
            split = getattr(parameter, "tensor_model_parallel", False) and tp > 1
            dim = parameter.partition_dim if split else 0
            shape = [n * tp if split and d == dim else n for d, n in enumerate(parameter.shape)]
            generator = torch.Generator().manual_seed(zlib.crc32(".".join(words).encode()))
            full = torch.randn(shape, generator=generator) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0)
            with torch.no_grad():
                parameter.copy_(full.chunk(tp, dim)[rank] if split else full)


def batches(step: int, length: int = LENGTH) -> Tensor:
    """Returns ids [batches, 2, length + 1] of a step, the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCHES, 2, length + 1), generator=generator)


def _forward_step(iterator: Any, model: Any) -> Any:
    """Runs a micro-batch as Megatron-Core's schedule asks; returns the losses and what takes their mean."""
    ids = next(iterator)
    length = ids.shape[1] - 1
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    out = model(ids[:, :-1], torch.arange(length).expand(len(ids), -1), mask, labels=ids[:, 1:])
    return out, lambda loss: (loss.float().mean(), {"loss": loss.float().mean().detach()})


class Training:
    """A model with Megatron-Core's data parallelism, optimizer and schedule.

    Args:
        fault: the name of a fault of `FAULTS` that is planted.
    """

    def __init__(self, layout: Layout, sharing: str | None, options: dict[str, Any], fault: str | None = None):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        self.layout = layout
        config, chunks, self.shares = built(layout, sharing, options)
        fill(chunks)
        if fault is not None:
            FAULTS[fault](self.shares)
        gathers = layout.overlap and layout.zero
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.zero, grad_reduce_in_fp32=True, overlap_grad_reduce=layout.overlap,
            overlap_param_gather=gathers,
        )  # fmt: skip
        if config.bf16:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        self.model = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-2, weight_decay=0.0, clip_grad=0.5, bf16=config.bf16,
                            params_dtype=config.params_dtype, use_distributed_optimizer=layout.zero,
                            overlap_param_gather=gathers), self.model,
        )  # fmt: skip
        config.finalize_model_grads_func = finalize_model_grads
        if self.shares is not None:
            config.finalize_model_grads_func = self.shares.finalize_model_grads
            if options.get("pool_lock_step"):
                self.shares.follow(self.optimizer)
        if layout.overlap:
            config.no_sync_func = [c.no_sync for c in self.model] if len(self.model) > 1 else self.model[0].no_sync

    def step(self, number: int) -> tuple[float, float]:
        """Trains on a batch; returns its loss, the same on all ranks, and the norm before clipping."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        model, dp = self.model, parallel_state.get_data_parallel_world_size()
        own = batches(number, self.layout.length)[parallel_state.get_data_parallel_rank() :: dp]
        for chunk in model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=_forward_step, data_iterator=[iter(own) for _ in model] if len(model) > 1 else iter(own),
            model=model if len(model) > 1 else model[0], num_microbatches=BATCHES // dp, seq_length=self.layout.length,
            micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        _, norm, _ = self.optimizer.step()
        total = torch.tensor([sum(float(one["loss"]) for one in found) / (BATCHES // dp), float(bool(found))])
        dist.all_reduce(total)
        return float(total[0] / total[1]), float(norm)


def count_calls() -> dict[str, int]:
    """Returns how often Megatron-Core's own layer, router, dispatcher and data parallelism will have been called."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    calls: dict[str, int] = {}

    def count(kind: Any, name: str) -> None:
        method, key = getattr(kind, name), f"{kind.__name__}.{name}"
        calls[key] = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return method(*args, **kwargs)

        setattr(kind, name, counted)

    count(MoELayer, "forward")
    count(TopKRouter, "routing")
    count(MoEAlltoAllTokenDispatcher, "token_dispatch")
    count(DistributedDataParallel, "finish_grad_sync")
    return calls


#: A way of sharing with its options, and a fault that is planted.
Case = tuple[str | None, dict[str, Any], str | None]


def train(layout: Layout, cases: list[Case], steps: int = 4) -> list[dict[str, Any]]:
    """Returns for each case losses and norms of a few steps, how far copies of what is shared differ between ranks, and whether
    Megatron-Core's own parts ran."""
    start(layout)
    results, calls = [], count_calls()
    for sharing, options, fault in cases:
        training = Training(layout, sharing, options, fault)
        losses, norms = zip(*(training.step(step) for step in range(steps)), strict=True)
        for chunk in training.model if layout.zero and layout.overlap else ():
            chunk.start_param_sync(force_sync=True)  # weights that else arrive in the next step
        results.append(
            {
                "losses": losses,
                "norms": norms,
                "copies": _copies(training.shares),
                "idle": [part for part, count in calls.items() if not count],
            }
        )
        calls.update(dict.fromkeys(calls, 0))
    return results


def _copies(shares: Any) -> dict[str, float]:
    """Returns how far this rank's shared parameters are from those of the first rank that holds the same ones."""
    if shares is None or shares._shared is None:
        return {}
    place = (shares.state.ep.rank, shares.state.etp.rank)
    own = {name: parameter.detach() for name, parameter in shares._shared.named_parameters()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (place, own))
    same = [held for other, held in everywhere if other == place]
    first = {name: next(held[name] for held in same if name in held) for name in own}
    return {name: float((parameter - first[name]).abs().max()) for name, parameter in own.items()}


def saved(layout: Layout, sharing: str, options: dict[str, Any], folder: str) -> list[float]:
    """Saves the model of a layout by Megatron-Core's dist_checkpointing; returns its losses of a batch."""
    from megatron.core import dist_checkpointing

    start(layout)
    _, chunks, _ = built(layout, sharing, options)
    fill(chunks)
    dist_checkpointing.save(chunks[0].sharded_state_dict(), folder)
    return _losses(chunks[0])


def loaded(layout: Layout, sharing: str, options: dict[str, Any], folder: str) -> list[float]:
    """Loads it in another layout, over a model of other values that it has used; returns the same losses."""
    from megatron.core import dist_checkpointing

    start(layout)
    _, chunks, _ = built(layout, sharing, {**options, "seed": 7})
    fill(chunks)
    _losses(chunks[0])
    chunks[0].load_state_dict(dist_checkpointing.load(chunks[0].sharded_state_dict(), folder))
    return _losses(chunks[0])


@torch.no_grad()
def _losses(model: Any) -> list[float]:
    """Returns the mean loss of a batch, on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    found = get_forward_backward_func()(
        forward_step_func=_forward_step, data_iterator=iter(batches(9)), model=model, num_microbatches=BATCHES, seq_length=LENGTH,
        micro_batch_size=2, forward_only=True,
    )  # fmt: skip
    return [float(one["loss"]) for one in found]


def _state(training: Training, is_loading: bool) -> dict[str, Any]:
    """Returns what Megatron-Core saves of a training: its model, and its optimizer in a form that any layout loads."""
    model = training.model[0].module.sharded_state_dict()
    return {
        "model": model,
        "optimizer": training.optimizer.sharded_state_dict(model, is_loading=is_loading),
    }


def saved_midway(layout: Layout, sharing: str, options: dict[str, Any], folder: str) -> None:
    """Trains two steps, and saves model and optimizer."""
    from megatron.core import dist_checkpointing

    start(layout)
    training = Training(layout, sharing, options)
    for step in range(2):
        training.step(step)
    dist_checkpointing.save(_state(training, is_loading=False), folder)


def trained_on(layout: Layout, sharing: str, options: dict[str, Any], folder: str) -> dict[str, list[float]]:
    """Loads them in another layout, into a model of other values; returns losses and norms of two steps more."""
    from megatron.core import dist_checkpointing

    start(layout)
    training = Training(layout, sharing, {**options, "seed": 7})
    training.step(9)  # of other weights, by which the optimizer has what it loads into
    content = dist_checkpointing.load(_state(training, is_loading=True), folder)
    training.model[0].module.load_state_dict(content["model"])
    training.optimizer.load_state_dict(content["optimizer"])
    losses, norms = zip(*(training.step(step) for step in (2, 3)), strict=True)
    return {"losses": list(losses), "norms": list(norms)}
