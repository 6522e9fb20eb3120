"""A model made from another, tensor by tensor: what every surgery returns.

Nothing is computed when it is made; each tensor is read and changed when the writer asks for it, so that a model of any
size passes through the memory of a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.cli import from_mapping, to_mapping
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.derived import experts_per_layer, flag
from megatron_samoe.config.option import LARGEST
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource, written_options
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.config.validate import refuse_wrong_numbers, validate, without_idle_options
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.layer_layout import LayerSpec, all_layers

#: Names of one expert's tensors, in the order of reading that lets a bank be read once for all layers.
EXPERT_WEIGHTS = ("w1", "b1", "w2", "b2")
SHARED = "expert_pool."
FRACTIONS = "training.expert_fractions"
#: Names in a checkpoint that are not the model's.
NOT_MODEL = ("optimizer.", "training.")


@dataclass
class EditedModel:
    """A source of tensors of which each has its own recipe.

    Attributes:
        report: lines that say what was done.
    """

    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    _recipes: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Returns a tensor, made now."""
        tensor = self._recipes[name]()
        stored = self.tensors[name]
        assert tuple(tensor.shape) == stored.shape, f"{name}: made {tuple(tensor.shape)}, promised {stored.shape}"
        return tensor.to(stored.dtype).contiguous()

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, recipe: Callable[[], Tensor]) -> None:
        """Adds a tensor that a recipe makes."""
        self.tensors[name] = StoredTensor(tuple(shape), dtype)
        self._recipes[name] = recipe

    def add_value(self, name: str, value: Tensor) -> None:
        """Adds a tensor that is there already."""
        self.add(name, tuple(value.shape), value.dtype, lambda: value)

    def keep(
        self, source: GlobalTensors, name: str, new_name: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Adds a tensor of the source, maybe under a new name or in another precision."""
        stored = source.tensors[name]
        self.add(new_name or name, stored.shape, dtype or stored.dtype, lambda: source.read(name))


class ReadOnce:
    """Reads tensors of a source and keeps the latest, for recipes that want the same one after another."""

    def __init__(self, source: GlobalTensors):
        self._source = source
        self._latest: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        """Returns a tensor that the caller must not change."""
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # not two at a time
            self._latest = name, self._source.read(name)
        return self._latest[1]


def with_sharing(config: PretrainConfig, sources: Sequence[ExpertSource]) -> PretrainConfig:
    """Returns the configuration of a model whose MoE layers have other sources of experts, without options that then have
    no effect.

    Raises:
        ConfigError: what layers may choose from changes while they train, which only their own way of sharing knows.
    """
    moe = config.moe
    for name, value in (("neighbour_unmask_steps", moe.neighbour_unmask_steps), ("pool_lock_step", moe.pool_lock_step)):
        if value:
            raise ConfigError(
                flag(name), value, f"cannot be kept where experts are shared otherwise than by {moe.sharing}"
            )
    counts = experts_per_layer(moe, len(sources))
    layout: dict[str, Any] = written_options(sources)
    scope = moe.moe_balance_scope
    if moe.balances_sets:
        scope = "set" if any(source.way.in_sets for source in sources) else None
    moe = replace(
        moe, num_experts=one_number(counts), num_expert_sets=1, untied_ends=0, moe_balance_scope=scope, **layout
    )
    return without_idle_options(replace(config, moe=moe))


def one_number(counts: Sequence[int]) -> int | tuple[int, ...]:
    """Returns --num-experts for layers with these numbers of experts."""
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


def begin_edit(
    source: GlobalTensors, config: PretrainConfig, is_kept: Callable[[str], bool] = lambda name: True
) -> EditedModel:
    """Returns a model with a new configuration, which has a source's tensors so far, and no optimizer state.

    Args:
        is_kept: whether it has a parameter, by its name.

    Raises:
        ConfigErrors: the new configuration is not legal.
    """
    validate_model(config)
    plain = {k: v for k, v in source.train_state.items() if k not in ("optimizer_steps", "digests", "format_version")}
    edited = EditedModel(to_mapping(config), plain, attachments=source.attachments)
    for name in filter(is_kept, model_names(source)):
        edited.keep(source, name)
    return edited


def validate_model(config: PretrainConfig) -> None:
    """Raises ConfigErrors where a model is not legal: not where its run got its data, nor its layout, batch or length."""
    training = TrainingConfig(train_iters=LARGEST)
    validate(PretrainConfig(config.model, config.moe, data=DataConfig(mock_data=True), training=training), 1)


def source_config(source: GlobalTensors) -> PretrainConfig:
    """Returns the configuration of a source."""
    config = from_mapping(source.config, "the checkpoint's config.yaml")
    refuse_wrong_numbers(config)  # before a list is made from its sizes
    return config


def require(is_met: bool, config: PretrainConfig, needed: str, action: str) -> None:
    """Raises ConfigError unless the source is one that an action takes; `needed` says which these are."""
    if not is_met:
        sharing = "" if config.moe.expert_sharing is None else f" and expert_sharing {config.moe.expert_sharing}"
        raise ConfigError(
            "--load-dir",
            f"a checkpoint with expert_layout {config.moe.expert_layout}{sharing}",
            f"{action} needs a checkpoint with {needed}",
        )


def model_names(source: GlobalTensors) -> list[str]:
    """Returns the names of a source's model parameters, without what only training needs."""
    return [name for name in source.tensors if not name.startswith(NOT_MODEL)]


def moe_layers(config: PretrainConfig) -> list[LayerSpec]:
    """Returns the layers that have experts, in order."""
    return [place for place in all_layers(config) if place.moe_index is not None]


def compute_dtype(source: GlobalTensors) -> torch.dtype:
    """Returns the dtype that the model computes in, which its word embedding is stored in."""
    return source.tensors["embedding.word.weight"].dtype


def add_fractions(
    edited: EditedModel, source: GlobalTensors, num_experts: Sequence[int], order_LE: Tensor | None = None
) -> None:
    """Adds the expert loads that a continued run starts from: the source's, reordered or of some experts only, or uniform.

    Args:
        num_experts: of each MoE layer; a layer with fewer than another has no loads in the last columns.
    """

    def recipe() -> Tensor:
        if FRACTIONS not in source.tensors:
            return uniform_fractions(num_experts)
        fractions_LE = source.read(FRACTIONS)
        if order_LE is None:
            return fractions_LE
        taken_LE = fractions_LE.gather(1, order_LE)
        return taken_LE / taken_LE.sum(1, keepdim=True) if order_LE.shape[1] < fractions_LE.shape[1] else taken_LE

    edited.add(FRACTIONS, (len(num_experts), max(num_experts)), torch.float32, recipe)


def uniform_fractions(num_experts: Sequence[int]) -> Tensor:
    """Returns equal loads of each layer's experts."""
    fractions_LE = torch.zeros(len(num_experts), max(num_experts))
    for fractions_E, count in zip(fractions_LE, num_experts, strict=True):
        fractions_E[:count] = 1 / count
    return fractions_LE
