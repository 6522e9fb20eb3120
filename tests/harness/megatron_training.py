"""Steps of a small model by Megatron-Core's own layers, data parallelism, optimizer and schedule, with shared experts."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY, LENGTH, BATCHES = 64, 16, 4


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, and how Megatron-Core trains."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    chunks: int = 1
    zero: bool = False
    micro_batches: int = 2
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
    """Returns the TransformerConfig of four layers of four experts, or a configuration of another class."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "num_moe_experts": 4,
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
            config, TransformerBlockSubmodules([spec] * count, Norm), vocab_size=VOCABULARY, max_sequence_length=LENGTH,
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


def batches(step: int) -> Tensor:
    """Returns ids [batches, 2, length + 1] of a step, the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCHES, 2, LENGTH + 1), generator=generator)


def _forward_step(iterator: Any, model: Any) -> Any:
    """Runs a micro-batch as Megatron-Core's schedule asks; returns the losses and what takes their mean."""
    ids = next(iterator)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    out = model(ids[:, :-1], torch.arange(LENGTH).expand(len(ids), -1), mask, labels=ids[:, 1:])
    return out, lambda loss: (loss.mean(), {"loss": loss.mean().detach()})


def train(
    layout: Layout, sharing: str | None, options: dict[str, Any], steps: int = 3, fault: str | None = None
) -> dict[str, Any]:
    """Returns losses and norms of a few steps, and copies of what is shared that differ between ranks.

    Args:
        fault: the name of a fault of `FAULTS` that is planted.
    """
    start(layout)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config, chunks, shares = built(layout, sharing, options)
    fill(chunks)
    if fault is not None:
        FAULTS[fault](shares)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=layout.zero, grad_reduce_in_fp32=True)
    model = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-2, weight_decay=0.0, clip_grad=0.5,
                        use_distributed_optimizer=layout.zero), model,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads if shares is None else shares.finalize_model_grads
    dp, number = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    losses, norms = [], []

    for step in range(steps):
        own = batches(step)[number::dp]
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=_forward_step, data_iterator=[iter(own) for _ in model] if len(model) > 1 else iter(own),
            model=model if len(model) > 1 else model[0], num_microbatches=BATCHES // dp, seq_length=LENGTH, micro_batch_size=2,
            forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        total = torch.tensor([sum(float(one["loss"]) for one in found) / (BATCHES // dp), float(bool(found))])
        dist.all_reduce(total)
        losses.append(float(total[0] / total[1]))
        norms.append(float(norm))
    return {"losses": losses, "norms": norms, "copies": _copies(shares)}


def _copies(shares: Any) -> dict[str, float]:
    """Returns how far this rank's shared parameters are from those of the first rank that holds the same ones."""
    if shares is None or shares._shared is None:
        return {}
    found: dict[str, float] = {}
    place = (shares.state.ep.rank, shares.state.etp.rank)
    for name, parameter in shares._shared.named_parameters():
        copies: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(copies, (place, parameter.detach()))
        first = next(tensor for other, tensor in copies if other == place)
        found[name] = float((parameter.detach() - first).abs().max())
    return found


def _sum_over_the_wrong_group(shares: Any) -> None:
    for parameter in shares._shared.parameters():
        parameter.allreduce = not parameter.allreduce


def _count_once_a_stage(shares: Any) -> None:
    for parameter in shares._shared.parameters():
        parameter.shared = False


def _leave_one_copy_alone(shares: Any) -> None:
    finish = shares.finalize_model_grads

    def without_gradient(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        for parameter in shares._shared.parameters() if shares.state.pp.rank else ():
            parameter.main_grad.zero_()

    shares.finalize_model_grads = without_gradient


def _send_before_the_end(shares: Any) -> None:
    """Completes gradients after the optimizer has them."""
    finish = shares.finalize_model_grads

    def late(model: Any, *args: Any, **kwargs: Any) -> None:
        lender = shares._lender
        end = lender.finish_step
        lender.finish_step = lambda: None
        finish(model, *args, **kwargs)
        lender.finish_step = end
        end()

    shares.finalize_model_grads = late


def _combine_once(shares: Any) -> None:
    shares.forget = lambda: None


#: What a plug-in could do wrong, planted after the model is attached.
FAULTS: dict[str, Any] = {
    "summed over the wrong group": _sum_over_the_wrong_group,
    "counted once a stage": _count_once_a_stage,
    "one stage's copy not updated": _leave_one_copy_alone,
    "sent before the last micro-batch": _send_before_the_end,
    "a stale combination": _combine_once,
}


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
