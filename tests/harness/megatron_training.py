"""Steps and checkpoints of a small model by Megatron-Core's own layers, data parallelism, optimizer and schedule, with shared experts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.megatron_model import LENGTH, Layout, Model, batches, built, fill, run, start
from tests.harness.ranks import run_ranks

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


class Training:
    """A model with Megatron-Core's data parallelism, optimizer and schedule."""

    def __init__(self, layout: Layout, sharing: str | None, options: dict[str, Any]):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        self.layout = layout
        config, chunks, self.shares = built(layout, Model(sharing=sharing, sharing_options=options))
        fill(chunks)
        gathers = layout.overlap and layout.zero
        common = {"use_distributed_optimizer": layout.zero, "overlap_param_gather": gathers}
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=layout.overlap, **common)
        if config.bf16:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        self.model = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
        types = {"bf16": config.bf16, "params_dtype": config.params_dtype}
        rates = {"optimizer": "adam", "lr": 1e-2, "min_lr": 1e-2, "weight_decay": 0.0, "clip_grad": 0.5}
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**rates, **types, **common), self.model)
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

        own = slice(parallel_state.get_data_parallel_rank(), None, parallel_state.get_data_parallel_world_size())
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = run(self.model, batches(number, self.layout.length)[own])
        _, norm, _ = self.optimizer.step()
        losses = torch.stack([out.float().mean() for out in found]) if found else torch.zeros(1)
        total = torch.tensor([float(losses.mean()), float(bool(found))])
        dist.all_reduce(total)
        return float(total[0] / total[1]), float(norm)


def spies() -> dict[str, Any]:
    """Returns what counts the calls of Megatron-Core's own layer, router, dispatcher and data parallelism from now on."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    methods = {MoELayer: "forward", TopKRouter: "routing", MoEAlltoAllTokenDispatcher: "token_dispatch"}
    return {
        f"{kind.__name__}.{name}": mock.patch.object(kind, name, autospec=True, side_effect=getattr(kind, name)).start()
        for kind, name in (methods | {DistributedDataParallel: "finish_grad_sync"}).items()
    }


def train(layout: Layout, cases: list[tuple[str | None, dict[str, Any]]], steps: int = 4) -> list[dict[str, Any]]:
    """Returns for each case losses and norms of a few steps, how far copies of what is shared differ between ranks, and whether
    Megatron-Core's own parts ran."""
    start(layout)
    results, counted = [], spies()
    for sharing, options in cases:
        training = Training(layout, sharing, options)
        started = _shared(training.shares)
        has_experts = any(
            name.endswith("router.weight") for chunk in training.model for name, _ in chunk.named_parameters()
        )
        losses, norms = zip(*(training.step(step) for step in range(steps)), strict=True)
        for chunk in training.model if layout.zero and layout.overlap else ():
            chunk.start_param_sync(force_sync=True)  # weights that else arrive in the next step
        results.append(
            {
                "losses": losses,
                "norms": norms,
                "copies": _copies(training.shares),
                "unmoved": [name for name, p in _shared(training.shares).items() if torch.equal(p, started[name])],
                "idle": [
                    part
                    for part, spy in counted.items()
                    if not spy.called and (has_experts or part == "DistributedDataParallel.finish_grad_sync")
                ],
            }
        )
        for spy in counted.values():
            spy.reset_mock()
    return results


def _shared(shares: Any) -> dict[str, Tensor]:
    """Returns copies of this rank's shared parameters."""
    if shares is None or shares._shared is None:
        return {}
    return {name: parameter.detach().clone() for name, parameter in shares._shared.named_parameters()}


def _copies(shares: Any) -> dict[str, float]:
    """Returns how far this rank's shared parameters are from those of the first rank that holds the same ones."""
    if shares is None:
        return {}
    own = _shared(shares)
    place = (shares.state.ep.rank, shares.state.etp.rank)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (place, own))
    same = [held for other, held in everywhere if other == place]
    first = {name: next(held[name] for held in same if name in held) for name in own}
    return {name: float((parameter - first[name]).abs().max()) for name, parameter in own.items()}


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
