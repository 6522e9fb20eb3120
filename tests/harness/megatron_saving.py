"""Checkpoints of format torch_dist by Megatron-Core's own `dist_checkpointing`: what it trained, and what it trains on from."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.megatron_training import (
    BATCHES,
    LENGTH,
    VOCABULARY,
    Layout,
    Norm,
    batches,
    fill,
    model_config,
    start,
)

#: Names of arguments of Megatron-LM's where they are not those of Megatron-Core's fields.
_ARGUMENTS = {"num_moe_experts": "num_experts", "gated_linear_unit": "swiglu", "layernorm_epsilon": "norm_epsilon"}
#: Latent attention as DeepSeek has it, positions scaled by YaRN.
LATENTS = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 12, "rope_type": "yarn",
    "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.7,
    "qk_layernorm": True, "kv_channels": None, "num_query_groups": 4,
}  # fmt: skip


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


@dataclass(frozen=True)
class Model:
    """What Megatron-Core builds, besides the options of `Layout`.

    Attributes:
        sharing: way of the plug-in, and its options.
        metadata: of sharded_state_dict.
    """

    latent: bool = False
    vocabulary: int = VOCABULARY
    tied: bool = False
    sharing: str | None = None
    sharing_options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None


def _built(layout: Layout, kind: Model) -> tuple[Any, Any, Any]:
    """Returns the configuration, this rank's model, and what shares its experts."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_samoe.plugins.megatron_core import ExpertSharing

    config = model_config(layout, MLATransformerConfig if kind.latent else None)
    is_moe = [config.num_moe_experts is not None] * config.num_layers
    if isinstance(config.moe_layer_freq, list):
        is_moe = [bool(one) for one in config.moe_layer_freq]
    shares = None if kind.sharing is None else ExpertSharing(config, kind.sharing, **kind.sharing_options)

    def spec(experts: bool) -> Any:
        made = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if experts else None, normalization="RMSNorm", qk_layernorm=config.qk_layernorm,
            multi_latent_attention=kind.latent,
        )  # fmt: skip
        made.submodules.input_layernorm = made.submodules.pre_mlp_layernorm = Norm
        if kind.latent:
            made.submodules.self_attention.submodules.core_attention = Core
        if config.qk_layernorm:
            attention = made.submodules.self_attention.submodules
            attention.q_layernorm = Norm
            setattr(attention, "kv_layernorm" if kind.latent else "k_layernorm", Norm)
        return made if shares is None else shares.spec(made)

    count = get_num_layers_to_build(config)
    first = parallel_state.get_pipeline_model_parallel_rank() * count
    model = GPTModel(
        config, TransformerBlockSubmodules([spec(one) for one in is_moe[first : first + count]], Norm), vocab_size=kind.vocabulary,
        max_sequence_length=LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=kind.tied,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    return config, model if shares is None else shares.attach(model), shares


def _arguments(config: Any, kind: Model) -> argparse.Namespace:
    """Returns what Megatron-LM's training program keeps of its command line."""
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {_ARGUMENTS.get(name, name): value for name, value in plain.items() if not callable(value)}
    plain |= kind.sharing_options
    plain |= {
        "position_embedding_type": "rope",
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "untie_embeddings_and_output_weights": not kind.tied,
        "vocab_size": kind.vocabulary,
        "make_vocab_size_divisible_by": 8,
        "expert_sharing": kind.sharing,
    }
    return argparse.Namespace(**{"rotary_base": 10000, "rotary_percent": 1.0, **plain})


def _run(model: Any, steps: int, train: Any = None, labels: bool = True) -> list[Any]:
    """Returns what the last stage gives of a batch: losses, or logits [B, S, V] of each micro-batch."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def forward_step(iterator: Any, model: Any) -> Any:
        ids = next(iterator)
        words = {"labels": ids[:, 1:]} if labels else {}
        out = model(ids[:, :-1], torch.arange(LENGTH).expand(len(ids), -1), mask, **words)
        return out, lambda out: (out.mean(), {"out": out.detach().clone()})

    found = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches(steps)), model=model, num_microbatches=BATCHES,
        seq_length=LENGTH, micro_batch_size=2, forward_only=train is None,
    )  # fmt: skip
    return [one["out"] for one in found]


def _trained(config: Any, model: Any, shares: Any, steps: int) -> tuple[Any, list[float]]:
    """Trains a model; returns its optimizer and the losses of the last stage."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.0), [wrapped])
    config.finalize_model_grads_func = finalize_model_grads if shares is None else shares.finalize_model_grads
    if shares is not None:
        shares.follow(optimizer)
    losses = []
    for step in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        found = _run(wrapped, step, train=True)
        optimizer.step()
        losses += [float(torch.stack(found).mean())] if found else []
    if shares is not None:
        shares.forget()
    return optimizer, losses


def saved(layout: Layout, kind: Model, folder: str, steps: int = 2) -> Tensor | None:
    """Trains a model and saves it with its arguments and its optimizer; returns the last stage's logits [T, V] of `batches(9)`."""
    start(layout)
    from megatron.core import dist_checkpointing

    config, model, shares = _built(layout, kind)
    fill([model])
    optimizer, _ = _trained(config, model, shares, steps)
    weights = model.sharded_state_dict(metadata=kind.metadata)
    state = {"args": _arguments(config, kind), "iteration": steps, "checkpoint_version": 3.0, "model": weights}
    if kind.metadata is None and not kind.latent and shares is None:
        state["optimizer"] = optimizer.sharded_state_dict(weights)
    os.makedirs(folder, exist_ok=True)
    dist_checkpointing.save(state, folder)
    with torch.no_grad():
        logits = _run(model.eval(), 9, labels=False)
    return torch.cat(logits).flatten(0, 1) if logits else None


def converted(layout: Layout, kind: Model, folder: str, made: str) -> None:
    """Loads a checkpoint of ours by Megatron-Core and saves this rank's file of the format `torch`, as Megatron-LM's
    --ckpt-convert-format does: what the model's `state_dict_for_save_checkpoint` returns, with its arguments."""
    start(layout)
    from megatron.core import dist_checkpointing, parallel_state

    config, model, _ = _built(layout, kind)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)["model"])
    ranks = [getattr(parallel_state, f"get_{axis}_model_parallel_rank")() for axis in ("tensor", "pipeline", "expert")]
    name = f"mp_rank_{ranks[0]:02d}" + "".join(
        f"_{rank:03d}" for rank, size in zip(ranks[1:], (layout.pp, layout.ep), strict=True) if size > 1
    )
    state = {"args": _arguments(config, kind), "iteration": 3, "checkpoint_version": 3.0}
    state["args"].padded_vocab_size = kind.vocabulary
    os.makedirs(os.path.join(made, name), exist_ok=True)
    torch.save(
        {**state, "model": model.state_dict_for_save_checkpoint()}, os.path.join(made, name, "model_optim_rng.pt")
    )


def continued(layout: Layout, kind: Model, folder: str, steps: int = 2) -> tuple[dict[str, Tensor], list[float]]:
    """Loads a checkpoint by Megatron-Core, and trains on; returns this rank's weights as loaded, and losses of the last stage."""
    start(layout)
    from megatron.core import dist_checkpointing

    config, model, shares = _built(layout, kind)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=kind.metadata)}, folder)
    model.load_state_dict(loaded["model"])
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, _trained(config, model, shares, steps)[1]
