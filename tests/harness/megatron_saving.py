"""Checkpoints of format torch_dist by Megatron-Core's own `dist_checkpointing`: what it trained, and what it trains on from."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from tests.harness.megatron_model import LENGTH, Layout, Model, batches, built, fill, run, start

#: Names of arguments of Megatron-LM's where they are not those of Megatron-Core's fields.
_ARGUMENTS = {"num_moe_experts": "num_experts", "gated_linear_unit": "swiglu", "layernorm_epsilon": "norm_epsilon"}


def _built(layout: Layout, kind: Model) -> tuple[Any, Any, Any]:
    """Returns the configuration, this rank's model of one chunk, and what shares its experts."""
    config, (model,), shares = built(layout, kind)
    return config, model, shares


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
        found = run([wrapped], batches(step))
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
        logits = run([model.eval()], batches(9), forward_only=True, labels=False)
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
