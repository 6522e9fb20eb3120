"""Whole models in memory as a source of tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import from_mapping, to_mapping
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.models.rank_model import RankModel, build_model
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients
from tests.harness.tiny import VOCAB_SIZE, global_batch

PLAIN_STATE = {
    "iteration": 7,
    "consumed_samples": 56,
    "consumed_tokens": 896,
    "vocab_size": VOCAB_SIZE,
    "loss_scale": {"value": 1.0, "good_steps": 0, "growth_interval": 0},
    "optimizer_steps": 7,
}


@dataclass
class MemorySource:
    """Tensors by name."""

    weights: dict[str, Tensor]
    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: StoredTensor(tuple(t.shape), t.dtype) for name, t in self.weights.items()}

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()


def new_source(
    config: PretrainConfig, seed: int = 0, spread: float = 0.2, dtype: torch.dtype = torch.float32
) -> MemorySource:
    """Returns a model with random values in every tensor, biases, norms and coefficients too."""
    model = build_model(config, VOCAB_SIZE, single_process_state(), dtype)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.global_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator) * spread
        weights[name] = (parameter.detach() + noise.to(parameter.dtype)).to(parameter.dtype)
    weights["optimizer.exp_avg.final_norm.weight"] = torch.ones(config.model.hidden_size)
    return MemorySource(weights, to_mapping(config), dict(PLAIN_STATE))


def load(source: GlobalTensors, dtype: torch.dtype = torch.float32) -> RankModel:
    """Returns the source's model; every parameter is read, and nothing is left over."""
    config = from_mapping(source.config, "test")
    model = build_model(config, source.train_state["vocab_size"], single_process_state(), dtype)
    parameters = model.global_parameters()
    held = {name for name in source.tensors if not name.startswith(("optimizer.", "training."))}
    assert held == set(parameters)
    for name, parameter in parameters.items():
        tensor = source.read(name)
        assert tensor.shape == parameter.shape, name
        parameter.data.copy_(tensor)
    return model.eval()


@torch.no_grad()
def logits(source: GlobalTensors, dtype: torch.dtype = torch.float32, tokens: Tensor | None = None) -> Tensor:
    """Returns logits [T, V] of tokens [B, S], or else of a batch of random ones, without padding."""
    model = load(source, dtype)
    model.begin_step()
    tokens = global_batch(model.config, 0)["tokens"] if tokens is None else tokens
    context = ForwardContext(batch_size=len(tokens), training=False)
    result, _ = model(tokens, context)
    return result[:, : model.vocab_size]


@torch.no_grad()
def loss(source: GlobalTensors) -> float:
    """Returns the mean loss of a batch of random tokens."""
    model = load(source)
    model.begin_step()
    batch = global_batch(model.config, 0)
    result, _ = model(batch["tokens"], ForwardContext(batch_size=len(batch["tokens"]), training=False))
    return float(model.loss(result, batch["labels"]).mean())


def gradients(source: GlobalTensors, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of what is trained, in a training step of one micro-batch."""
    config, sequences = from_mapping(source.config, "test"), len(batch["tokens"])
    training = replace(config.training, micro_batch_size=sequences, global_batch_size=sequences)
    config = replace(config, training=training)
    setup = build_setup(config, source.train_state["vocab_size"], single_process_state(), torch.float32)
    named = setup.model.global_parameters()
    for name, parameter in named.items():
        parameter.data.copy_(source.read(name))
    compute_gradients(setup, initial_state(setup), [dict(batch)])
    return {name: p.main_grad for name, p in named.items() if p.requires_grad}


def router_gradients(source: GlobalTensors, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the gradients of all routers' weights."""
    return [grad for name, grad in gradients(source, batch).items() if name.endswith("router.weight")]
