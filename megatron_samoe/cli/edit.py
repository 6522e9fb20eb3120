"""The surgery tool's command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_samoe.cli.program import Group, Number, program
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.convert.edited_model import EditedModel, model_names
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.hf.export import refuse_other_tensors
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.convert.target import how_to_train_on
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, write_checkpoint
from megatron_samoe.errors import CheckpointError, ConfigError, in_units
from megatron_samoe.fit.surgery.pool import SetOptions, pool_moe, tie_layers
from megatron_samoe.fit.surgery.select import select_samoe, tie_selected
from megatron_samoe.fit.surgery.student import keep_layers
from megatron_samoe.fit.surgery.upcycle import UpcycleOptions, upcycle_dense

Granularity = Literal["layer", "expert"]
Map = Annotated[str, tyro.conf.arg(metavar="MAP")]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """The actions that make another model from a trained one."""

    load_dir: str
    """folder of a run, of checkpoints, or of another program's model"""
    ckpt_step: int | None = None
    """iteration; the newest if not given"""
    save_dir: str
    """folder to write the new checkpoint in"""
    dry_run: bool = False
    """say what would be done, and write nothing"""

    def edited(self, source: GlobalTensors) -> EditedModel:
        """Returns the other model."""
        raise NotImplementedError

    def run(self) -> None:
        opened = open_folder(self.load_dir, self.ckpt_step)
        source = opened.model
        iteration = int(source.train_state.get("iteration", 0))
        target = store.iteration_dir(self.save_dir, iteration)
        if target.exists():
            raise CheckpointError(f"{target} exists; give another --save-dir.")
        refuse_other_tensors(opened)
        edited = self.edited(source)
        print("\n".join(edited.report))
        print(_sizes(source, edited))
        if self.dry_run:
            print("Nothing is written (--dry-run).")
            return
        written = write_checkpoint(Path(self.save_dir), iteration, edited)
        print(f"Written to {written}, without optimizer state.{how_to_train_on(Path(self.save_dir))}")


@dataclass(frozen=True, kw_only=True)
class Upcycle(Edit):
    """a dense model becomes a MoE or a SaMoE that computes the same"""

    expert_layout: Literal["moe", "samoe"]
    num_experts: Annotated[int, tyro.conf.arg(metavar="E")]
    moe_router_topk: Annotated[int, tyro.conf.arg(metavar="K")] = 1
    moe_router_pre_softmax: bool = False
    """weigh experts by their score among all experts; derived if neither this nor its opposite is given: true for top-1"""
    no_moe_router_pre_softmax: bool = False
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_layer_freq: str = "1"
    """which layers get experts"""
    moe_ffn_hidden_size: int | None = None
    """width of new experts, with --dense-mlp shared-expert"""
    num_expert_banks: Annotated[int | None, tyro.conf.arg(metavar="P")] = None
    samoe_granularity: Granularity = "layer"
    """coefficients per layer, or per layer and expert"""
    samoe_init: Literal["cyclic", "block", "uniform"] | None = None
    dense_mlp: Literal["experts", "shared-expert"] = "experts"
    """experts: each is a copy; shared-expert: the MLP serves all tokens, next to new experts that begin at 0"""
    noise: float = 0.0
    """added to each copy, as a share of the weights' own spread"""
    router_std: float | None = None
    """spread of the routers' weights; derived if not given"""
    seed: int = 1234

    def edited(self, source: GlobalTensors) -> EditedModel:
        names = {f.name for f in fields(MoEConfig)} & {f.name for f in fields(self)} - {"moe_router_pre_softmax"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.moe_router_pre_softmax or self.no_moe_router_pre_softmax:
            given["moe_router_pre_softmax"] = self.moe_router_pre_softmax
        return upcycle_dense(
            source, UpcycleOptions(MoEConfig(**given), self.dense_mlp, self.noise, self.router_std, self.seed)
        )


@dataclass(frozen=True, kw_only=True)
class Pool(Edit):
    """a MoE becomes the nearest SaMoE"""

    num_expert_banks: Annotated[int, tyro.conf.arg(metavar="P")]
    expert_sharing: Map = "combined"
    """layers that combine banks, such as own,combined*6,own; all if not given"""
    samoe_granularity: Granularity = "layer"
    """coefficients per layer, or per layer and expert"""

    def edited(self, source: GlobalTensors) -> EditedModel:
        return pool_moe(source, self.num_expert_banks, self.samoe_granularity, self.expert_sharing)


@dataclass(frozen=True, kw_only=True)
class Tie(Edit):
    """layers of a MoE come to use sets of experts, the nearest to their own"""

    expert_sharing: Map
    """tied, scaled, pool, or a map such as 0,1,1,1,2 or scaled:0*4,1*4"""
    num_expert_sets: Number = 1
    """sets of tied or scaled"""
    untied_ends: Number = 0
    """first and last MoE layers that keep their own"""
    sets_from: Annotated[str, tyro.conf.arg(metavar="LAYERS")] = "average"
    """average, or for each set the layer whose experts it takes, such as 0,4"""

    def edited(self, source: GlobalTensors) -> EditedModel:
        layers = None if self.sets_from == "average" else _numbers("--sets-from", self.sets_from)
        return tie_layers(source, self.expert_sharing, SetOptions(self.num_expert_sets, self.untied_ends, layers))


@dataclass(frozen=True, kw_only=True)
class Fold(Edit):
    """a model whose layers share experts becomes the plain MoE that computes the same"""

    def edited(self, source: GlobalTensors) -> EditedModel:
        return fold_shared(source)


@dataclass(frozen=True, kw_only=True)
class Select(Edit):
    """each layer takes one bank, or its set without a factor"""

    scale: Literal["keep", "one"] = "keep"
    """keep: the bank keeps its coefficient; one: it becomes 1, the layer is exactly a bank"""
    to: Literal["banks", "tied"] = "banks"
    """banks: a SaMoE with one-hot coefficients; tied: sets that layers use as they are, where --scale keep is for w2 only and
    moves into the weights of routing"""

    def edited(self, source: GlobalTensors) -> EditedModel:
        return (select_samoe if self.to == "banks" else tie_selected)(source, self.scale)


@dataclass(frozen=True, kw_only=True)
class Student(Edit):
    """a model of fewer layers starts from chosen ones"""

    keep_layers: Annotated[str, tyro.conf.arg(metavar="LAYERS")]
    """rising numbers, such as 0,2,4"""

    def edited(self, source: GlobalTensors) -> EditedModel:
        return keep_layers(source, _numbers("--keep-layers", self.keep_layers))


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    parts = text.replace(" ", "").split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise ConfigError(flag, text, "must be numbers of layers between commas, such as 0,2,4")
    return tuple(map(int, parts))


def _sizes(source: GlobalTensors, edited: EditedModel) -> str:
    (count, num_bytes), (new_count, new_bytes) = _size(source), _size(edited)
    dropped = sum(name.startswith("optimizer.") for name in source.tensors)
    return (
        f"{count:,} parameters ({in_units(num_bytes, 'B')}) become {new_count:,} ({in_units(new_bytes, 'B')}); "
        f"{dropped} tensors of optimizer state are dropped."
    )


def _size(model: GlobalTensors) -> tuple[int, int]:
    """Returns elements and bytes of a model's weights."""
    stored = [model.tensors[name] for name in model_names(model)]
    return sum(t.num_elements for t in stored), sum(t.num_bytes for t in stored)


ACTIONS = {"upcycle": Upcycle, "pool": Pool, "tie": Tie, "fold": Fold, "select": Select, "student": Student}
main = program(Group(ACTIONS, "Makes another model from a trained one."))

if __name__ == "__main__":
    sys.exit(main())
