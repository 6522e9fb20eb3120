"""The ranks of each group, by pure arithmetic without torch.

Two grids lie over the same ranks. In both the first axis changes fastest, so that neighbours share tensors:

    dense    tp  x cp x dp   x pp      attention, norms, embeddings, dense MLPs
    expert   etp x ep x edp  x pp      routed experts and the shared pool

so `tp * cp * dp = etp * ep * edp`. With etp = tp an expert-parallel group has ranks with other tokens: parts
of a sequence (cp) or other sequences (dp). With etp = 1 it may also span tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_samoe.config.parallel import ParallelConfig

#: Named groups: the axes along which members differ, and the grid these axes belong to.
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tp": ("dense", ("tp",)),
    "cp": ("dense", ("cp",)),
    "dp": ("dense", ("dp",)),
    "pp": ("dense", ("pp",)),
    # All ranks with other tokens, whether of the same sequences or of others: they hold replicas of dense parameters.
    "dp_cp": ("dense", ("cp", "dp")),
    # Dense parameters whose gradient is a partial sum over tensor-parallel ranks (norms of split heads).
    "tp_dp_cp": ("dense", ("tp", "cp", "dp")),
    "etp": ("expert", ("etp",)),
    "ep": ("expert", ("ep",)),
    "edp": ("expert", ("edp",)),
    # Parameters whose gradient is a partial sum over expert-tensor ranks (output biases, per-expert coefficients).
    "etp_edp": ("expert", ("etp", "edp")),
    # All ranks of one pipeline stage: coefficients of banks are summed over it.
    "stage": ("expert", ("etp", "ep", "edp")),
    # Every stage uses the pool, so its replicas are on expert-data-parallel ranks of all stages.
    "pool_dp": ("expert", ("edp", "pp")),
    "etp_pool_dp": ("expert", ("etp", "edp", "pp")),
    # Tied embeddings live on the first and the last stage.
    "embed_dp": ("dense", ("cp", "dp", "pp")),
    "world": ("dense", ("tp", "cp", "dp", "pp")),
}


@dataclass(frozen=True)
class RankGrid:
    """The sizes of all axes; ValueError where they do not fill the world."""

    world_size: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1

    @staticmethod
    def of(layout: ParallelConfig, world_size: int) -> RankGrid:
        """Returns the grid of a layout; ValueError where it does not fill the world."""
        return RankGrid(
            world_size,
            tp=layout.tensor_model_parallel_size,
            pp=layout.pipeline_model_parallel_size,
            ep=layout.expert_model_parallel_size,
            etp=layout.expert_tp,
            cp=layout.context_parallel_size,
        )

    def __post_init__(self) -> None:
        dense = ("tp x pp", self.tp * self.pp) if self.cp == 1 else ("tp x cp x pp", self.tp * self.cp * self.pp)
        for name, size in (dense, ("etp x ep x pp", self.etp * self.ep * self.pp)):
            if size < 1 or self.world_size % size:
                raise ValueError(f"{name} = {size} does not divide the world of {self.world_size} ranks")

    @property
    def dp(self) -> int:
        """Data-parallel size of dense parameters: ranks with other sequences."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of expert parameters."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def axes(self, grid: str) -> dict[str, int]:
        """Returns axis -> size of the "dense" or "expert" grid, fastest axis first."""
        if grid == "dense":
            return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        return {"etp": self.etp, "ep": self.ep, "edp": self.edp, "pp": self.pp}

    def coordinates(self, rank: int, grid: str) -> dict[str, int]:
        """Returns axis -> position of a rank."""
        position = {}
        for axis, size in self.axes(grid).items():
            rank, position[axis] = divmod(rank, size)
        return position

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """Returns the rank lists of a named kind of group, in order of their first rank; together they hold each rank
        once.
        """
        grid, varying = GROUPS[name]
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self.coordinates(rank, grid)
            key = tuple(p for a, p in position.items() if a not in varying)
            if name == "embed_dp" and 0 < position["pp"] < self.pp - 1:
                key += (position["pp"],)  # stages between hold no embedding
            members.setdefault(key, []).append(rank)
        return [tuple(ranks) for ranks in members.values()]

    @lru_cache(maxsize=1 << 16)  # noqa: B019  grids are small values
    def size_and_rank(self, name: str, rank: int) -> tuple[int, int]:
        """Returns (size of a rank's group of that name, the rank's number in it), without listing any ranks."""
        grid, varying = GROUPS[name]
        position, size, number = self.coordinates(rank, grid), 1, 0
        for axis, length in self.axes(grid).items():
            if axis not in varying:
                continue
            own = position[axis]
            if name == "embed_dp" and axis == "pp":  # the first and the last stage; those between are in no group
                is_outer = own in (0, self.pp - 1)
                length, own = (min(self.pp, 2), 1 if 0 < own else 0) if is_outer else (1, 0)
            number, size = number + own * size, size * length
        return size, number
