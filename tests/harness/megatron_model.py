"""A small model of Megatron-Core's own layers, whose experts may be shared, and its micro-batches by Megatron-Core's schedule."""

from __future__ import annotations

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

from tests.harness.near_package import SITE
from tests.harness.tables import table

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
    overlap: bool = False
    length: int = LENGTH
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def virtual_stages(self) -> int | None:
        return self.chunks if self.chunks > 1 else None


@dataclass(frozen=True)
class Model:
    """What Megatron-Core builds, besides the options of `Layout`.

    Attributes:
        latent: whether attention is latent.
        tied: whether the output layer has the embedding's weights.
        sharing: way of the plug-in, and its options; None for Megatron-Core's own experts.
        metadata: of sharded_state_dict.
    """

    latent: bool = False
    vocabulary: int = VOCABULARY
    tied: bool = False
    sharing: str | None = None
    sharing_options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None


class Norm(nn.Module):
    """An RMSNorm that knows sequence parallelism, as Transformer Engine's and apex's do and torch's does not."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Core(nn.Module):
    """Attention over keys and values of different widths, which Transformer Engine's has and torch's here has not."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, softmax_scale: float, **_: Any
    ):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, ~mask, scale=self.scale)
        return y.permute(2, 0, 1, 3).flatten(2)


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
    experts = {"expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.etp}
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, layout.virtual_stages, **experts)
    model_parallel_cuda_manual_seed(1)


def model_config(layout: Layout, kind: Any = None) -> Any:
    """Returns the TransformerConfig of four layers of eight experts, or a configuration of another class."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "sequence_parallel": layout.tp > 1,
        "virtual_pipeline_model_parallel_size": layout.virtual_stages,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }
    types = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "activation_func": nn.functional.silu}
    return (kind or TransformerConfig)(**{**table(__file__)["model"], **types, **layout.options}, **parallel)


def built(layout: Layout, kind: Model) -> tuple[Any, list[Any], Any]:
    """Returns the configuration, the chunks of this rank's model, and what shares their experts."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_samoe.plugins.megatron_core import ExpertSharing

    config = model_config(layout, MLATransformerConfig if kind.latent else None)
    is_moe = [config.num_moe_experts is not None] * config.num_layers
    if not isinstance(config.moe_layer_freq, int):
        is_moe = [bool(one) for one in config.moe_layer_freq]
    shares = None if kind.sharing is None else ExpertSharing(config, kind.sharing, **kind.sharing_options)

    def spec(experts: bool) -> Any:
        norms = {"normalization": "RMSNorm", "qk_layernorm": config.qk_layernorm}
        made = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if experts else None,
            moe_grouped_gemm=False,
            multi_latent_attention=kind.latent,
            **norms,
        )
        made.submodules.input_layernorm = made.submodules.pre_mlp_layernorm = Norm
        attention = made.submodules.self_attention.submodules
        if kind.latent:
            attention.core_attention = Core
        if config.qk_layernorm:
            attention.q_layernorm = Norm
            setattr(attention, "kv_layernorm" if kind.latent else "k_layernorm", Norm)
        return made if shares is None else shares.spec(made)

    chunks = []
    for number in range(layout.chunks):
        stage = number if layout.chunks > 1 else None
        first = get_transformer_layer_offset(config, vp_stage=stage)
        count = get_num_layers_to_build(config, vp_stage=stage)
        ends = {"ignore_virtual": False, "vp_stage": stage}
        model = GPTModel(
            config,
            TransformerBlockSubmodules([spec(one) for one in is_moe[first : first + count]], Norm),
            vocab_size=kind.vocabulary,
            max_sequence_length=layout.length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=kind.tied,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=stage,
        )
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


def run(model: list[Any], ids: Tensor, forward_only: bool = False, labels: bool = True) -> list[Tensor]:
    """Runs micro-batches by Megatron-Core's schedule; returns what the last stage gives of each: losses, or logits [B, S, V]."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    length, is_one = ids.shape[2] - 1, len(model) == 1
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def forward_step(iterator: Any, chunk: Any) -> Any:
        own = next(iterator)
        words = {"labels": own[:, 1:]} if labels else {}
        out = chunk(own[:, :-1], torch.arange(length).expand(len(own), -1), mask, **words)
        return out, lambda out: (out.float().mean(), {"out": out.detach().clone()})

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(ids) if is_one else [iter(ids) for _ in model],
        model=model[0] if is_one else model,
        num_microbatches=len(ids),
        seq_length=length,
        micro_batch_size=2,
        forward_only=forward_only,
    )
    return [one["out"] for one in found]
