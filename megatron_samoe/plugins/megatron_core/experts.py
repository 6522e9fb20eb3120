"""The modules that replace the experts of a MoE layer of Megatron-Core, and the model's modules for all layers."""

from __future__ import annotations

from typing import Any, Protocol

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_samoe.moe.types import Experts
from megatron_samoe.parallel_state.parameter_tag import tag_of


class Lends(Protocol):
    """The interface of `ExpertSharing` that these modules use."""

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of a layer."""

    def sharded(self, part: nn.Module, prefix: str, label: str = "") -> dict[str, Any]:
        """Returns a part's parameters as Megatron-Core's checkpoints take them."""
        ...

    def forget(self) -> None:
        """Lets weights be combined anew."""


class LentExperts(MegatronModule):
    """The experts of one layer, which `ExpertSharing` lends; built and called as Megatron-Core's own experts are.

    Attributes:
        part: what the layer owns: its coefficients, its own experts, or nothing; set by `ExpertSharing.attach`.
    """

    part: nn.Module

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        sharing: Lends,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ):
        super().__init__(config)
        self.sharing, self.moe_index = (sharing,), -1  # in a tuple: it is not a module of this one

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Returns the results [R, H] of rows sorted by expert, times their probabilities, and no bias."""
        run = self.sharing[0].experts(self.moe_index)
        return run(rows, tokens_per_expert) * probs[:, None].to(rows.dtype), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Returns the layer's own part for Megatron-Core's checkpoints.

        Its names have the layer's number: Megatron-Core stacks tensors that all layers have, and not all own the same.
        """
        return self.sharing[0].sharded(self.part, prefix, f"layer_{self.moe_index}.")


class SharedExperts(MegatronModule):
    """The experts that all layers share, on one rank."""

    def __init__(self, config: Any, sharing: Lends, part: nn.Module):
        super().__init__(config)
        self.sharing, self.part = (sharing,), part
        # Loading writes new weights, of which nothing is combined yet.
        self.register_load_state_dict_post_hook(lambda *_: sharing.forget())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Returns the banks for Megatron-Core's checkpoints, each once for all layers and stages."""
        return self.sharing[0].sharded(self.part, prefix)


def sharded_tensor(name: str, parameter: nn.Parameter, state: Any) -> ShardedTensor:
    """Returns a parameter's offset in the full tensor, and which copy of it this rank has."""
    spec = tag_of(parameter).shard
    pieces = [(dim, state.group(axis).rank, state.group(axis).size) for dim, axis in spec.partition]
    copy = 0
    for axis in sorted({"etp", "ep"}.difference(axis for _, axis in spec.partition)):
        copy = copy * state.group(axis).size + state.group(axis).rank
    stage = state.pp.rank if spec.family == "pool" else 0
    return ShardedTensor.from_rank_offsets(name, parameter, *pieces, replica_id=(stage, copy, state.edp.rank))
