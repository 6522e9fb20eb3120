"""Which experts of a shared set a layer's router may choose, where that changes while training.

Each expert of a layer has a factor: 1 where it may be chosen, 0 where not, between them while it is taken away. Factors
are parameters that no gradient moves, so a checkpoint says what a model may choose.

Neighbours (ReXMoE, arXiv:2510.17483) begin with the number of experts that a layer owns, and open the others one by one. The lock of a
pool (UniPool, arXiv:2605.06665) gives each expert to one layer, and closes it to all others. It also gives experts new
positions in the pool, so that each layer's are spread evenly over expert-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.parallel_state.state import ParallelState


class CandidateSchedule(Protocol):
    """Changes factors after optimizer steps; `iteration` is the number of steps done."""

    def start(self, moe_index: int, num_experts: int) -> Tensor:
        """Returns a layer's factors [E] at the start."""

    def update(
        self, factors_E: Mapping[int, Tensor], votes_LE: Tensor, iteration: int, state: ParallelState
    ) -> Tensor | None:
        """Changes the factors of a rank's layers, by index of the MoE layer; all ranks call it together.

        Args:
            votes_LE: tokens of the last global batch that chose each expert, of all MoE layers; or the mean share of these in
                several steps, see `votes_before`.

        Returns:
            order_E, the expert that each index of the pool is to have from now on, the same on all ranks; None where experts
            stay.
        """


def candidate_schedule(config: MoEConfig) -> CandidateSchedule | None:
    """Returns what --expert-sharing asks for; None where all experts are candidates from first to last."""
    if config.neighbour_unmask_steps and config.sharing_reads("neighbour_unmask_steps"):
        return NeighbourSchedule(config)
    return PoolLock(config) if config.pool_lock_step is not None else None


class NeighbourSchedule:
    """Opens a block's experts evenly over --neighbour-unmask-steps, after --neighbour-unmask-start. In a layer's own order these
    are its own, then those of the next layer, in the order of the block, from whose end it continues at its start; in a random
    one the same number, others in each step (ReXMoE, equation 6)."""

    def __init__(self, config: MoEConfig):
        assert isinstance(config.num_experts, int)
        self._own, self._reuse = config.num_experts, config.num_neighbour_layers
        self._begin, self._steps = config.neighbour_unmask_start, config.neighbour_unmask_steps
        self._draws = config.neighbour_unmask_order == "random"

    def start(self, moe_index: int, num_experts: int) -> Tensor:
        """Returns 1 for the number of experts that the layer owns."""
        return self._factors(moe_index, num_experts, 0)

    def update(self, factors_E: Mapping[int, Tensor], votes_LE: Tensor, iteration: int, state: ParallelState) -> None:
        """Opens those that are due."""
        for moe_index, factors in factors_E.items():
            due = self._factors(moe_index, len(factors), iteration).to(factors)
            # What is open stays open, all at last: a run that starts again from these weights counts its steps anew.
            kept = torch.maximum(factors, due)
            factors.copy_(torch.where((factors < 1).any(), due, kept) if self._draws else kept)

    def _factors(self, moe_index: int, num_experts: int, iteration: int) -> Tensor:
        opened = min(max(iteration - self._begin, 0), self._steps)
        due = self._own + (num_experts - self._own) * opened // self._steps
        if self._draws:
            drawn = torch.Generator().manual_seed((iteration << 20) + moe_index)
            order = torch.randperm(num_experts, generator=drawn)
        else:
            order = (moe_index % self._reuse * self._own + torch.arange(num_experts)) % num_experts
        factors = torch.zeros(num_experts)
        factors[order[:due]] = 1.0
        return factors


class PoolLock:
    """Gives each expert of a pool to one layer after step --pool-lock-step, the same number to each layer, so that the experts' owners
    are those that chose them most in this step, or in the last --pool-lock-vote-steps of them. Others' factors fall to 0 over
    --pool-lock-anneal-steps, along a cosine."""

    def __init__(self, config: MoEConfig):
        assert config.pool_lock_step is not None
        self._at, self._anneal = config.pool_lock_step, config.pool_lock_anneal_steps

    def start(self, moe_index: int, num_experts: int) -> Tensor:
        """Returns 1 for all."""
        return torch.ones(num_experts)

    def update(
        self, factors_E: Mapping[int, Tensor], votes_LE: Tensor, iteration: int, state: ParallelState
    ) -> Tensor | None:
        """Decides once, from votes that all ranks know, and then follows its decision."""
        if iteration < self._at:
            return None
        # A stage without MoE layers, which holds a part of the pool, learns from the others whether they have decided.
        closed = any(bool((factors < 1).any()) for factors in factors_E.values())
        is_decided = bool(state.pp.all_reduce(torch.tensor(float(closed), device=state.device)))
        done = min((iteration - self._at + 1) / self._anneal, 1.0)
        left = min(0.5 + 0.5 * math.cos(math.pi * done), 1 - 2**-20)  # only an owner has 1, in fp32 too
        owner_E = None if is_decided else owners(votes_LE)
        owned = {i: factors.cpu() == 1 if owner_E is None else owner_E == i for i, factors in factors_E.items()}
        for moe_index, factors in factors_E.items():
            others = factors.clamp_max(left)  # a decision that was made before is not taken back
            factors.copy_(torch.where(owned[moe_index].to(factors.device), 1.0, others))
        return None if owner_E is None else spread(owner_E)


def votes_before(config: MoEConfig, iteration: int) -> int:
    """Returns how many steps vote before the one with which `iteration` are done, and which votes with them.

    0 where only it votes: also where the lock's own step was skipped, and a later one decides.
    """
    if config.pool_lock_step is None or iteration > config.pool_lock_step:
        return 0
    return max(iteration - 1 - config.pool_lock_step + config.pool_lock_vote_steps, 0)


def spread(owner_E: Tensor) -> Tensor:
    """Returns the expert for each index, so that all layers' experts are spread over the pool: the k-th of layer l at k L + l.

    So every expert-parallel size that divides E / L gives each rank equally many of each layer.
    """
    num_layers = int(owner_E.max()) + 1
    return owner_E.argsort(stable=True).view(num_layers, -1).T.flatten()


def owners(votes_LE: Tensor) -> Tensor:
    """Returns the layer [E] to which each expert goes, E / L to each, so that most of the choices voted for stay possible.

    This is the assignment problem, which scipy solves exactly.
    """
    from scipy import optimize  # which takes a second, once in a run

    num_layers, num_experts = votes_LE.shape
    assert num_experts % num_layers == 0, (num_layers, num_experts)
    slots_SE = votes_LE.repeat_interleave(num_experts // num_layers, dim=0).double().cpu().numpy()
    slots, experts = optimize.linear_sum_assignment(slots_SE, maximize=True)
    owner_E = torch.empty(num_experts, dtype=torch.int64)
    owner_E[torch.from_numpy(experts)] = torch.from_numpy(slots) // (num_experts // num_layers)
    return owner_E
