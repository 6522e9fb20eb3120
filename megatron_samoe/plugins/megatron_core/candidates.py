"""Routers of Megatron-Core that may choose some experts of a shared set only, and experts that are reordered with all that
its optimizers keep of them. Which experts, `moe/candidates.py` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.ops.topk_gate import limited

#: What Adam keeps of each element.
MOMENTS = ("exp_avg", "exp_avg_sq")


class CandidateRouter(TopKRouter):
    """Megatron-Core's router, whose experts have factors on their scores.

    Attributes:
        candidates: factors [E]; an expert with 0 is not chosen.
        steps: optimizer steps done [1]; in checkpoints, as candidates are.
        counts: tokens [E] of this rank that chose each expert since the last step.
    """

    candidates: Tensor
    steps: Tensor
    counts: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("candidates", torch.ones(self.num_experts, device=torch.cuda.current_device()))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64, device=self.candidates.device))
        self.register_buffer("counts", torch.zeros_like(self.candidates), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CandidateRouter:
        """Leaves factors and counts in fp32, where a model is converted to fewer bits."""
        super()._apply(fn, recurse)
        self.candidates, self.counts = self.candidates.float(), self.counts.float()
        return self

    def gating(self, input: Tensor) -> Tensor:
        """Returns logits [..., E] whose scores have the factors."""
        return limited(super().gating(input), self.candidates, multiplies=False)

    def routing(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what Megatron-Core's router does; counts choices once, also where a layer is recomputed."""
        routed = super().routing(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self.counts += routed[1].sum(0)
        return routed


def steps_done(routers: Iterable[CandidateRouter], like: Tensor) -> int:
    """Counts a step, and returns how many were done. All ranks call it together; some have no router."""
    for router in routers:
        router.steps += 1
    steps = torch.stack([like.new_zeros(1, dtype=torch.int64), *(router.steps for router in routers)]).max()
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return int(steps)


def global_counts(routers: Mapping[int, CandidateRouter], num_layers: int, like: Tensor) -> Tensor:
    """Returns how many tokens of the step chose each expert [L, E], of all layers and ranks, which call it together.

    Args:
        routers: of this rank, by index of the MoE layer.
        like: factors of a router.
    """
    counts_LE = like.new_zeros(num_layers, len(like))
    for moe_index, router in routers.items():
        counts_LE[moe_index] = router.counts
        router.counts.zero_()
    dist.all_reduce(counts_LE)
    return counts_LE


@torch.no_grad()
def reorder(optimizer: Any, parameter: Any, dim: int, order_E: Tensor, is_split: bool) -> None:
    """Reorders the experts of a parameter: weights, gradient, and what Megatron-Core's optimizer keeps of them.

    Args:
        dim: of the experts.
        order_E: the expert that each index is to have.
        is_split: whether experts are split over expert-parallel ranks. All ranks call it together.
    """
    main, moments, start, holders = _kept(optimizer, parameter)
    held = slice(start, start + (0 if main is None else main.numel()))
    grad = parameter.main_grad.view(-1)[held]
    for tensor in (main, *moments, grad):
        full = torch.zeros_like(parameter.main_grad).view(-1)
        if tensor is not None:
            full[held] = tensor.view(-1).to(full.dtype)
        if holders is not None:
            dist.all_reduce(full, group=holders)
        moved = _in_order(full.view(parameter.shape), dim, order_E, is_split)
        if tensor is main:
            parameter.copy_(moved)
        if tensor is not None:
            tensor.view(-1).copy_(moved.reshape(-1)[held])


def _in_order(shard: Tensor, dim: int, order_E: Tensor, is_split: bool) -> Tensor:
    """Returns a shard's experts in another order, which may bring them from other ranks."""
    if not is_split:
        return shard.index_select(dim, order_E)
    group = parallel_state.get_expert_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    return torch.cat(shards, dim).index_select(dim, order_E.chunk(group.size())[group.rank()])


def _kept(optimizer: Any, parameter: Any) -> tuple[Tensor | None, list[Tensor | None], int, Any]:
    """Returns master weights and Adam's moments, where they begin in the parameter, and the group of ranks that hold it in
    pieces; None where each holds all of it.

    Ranks among which the distributed optimizer shards a parameter hold consecutive elements, and maybe none.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        main: Any = getattr(parameter, "main_param", None)
        start, holders = 0, None
        if isinstance(one, DistributedOptimizer):
            holders = next((b.data_parallel_group for b in one.buffers if parameter in b.param_index_map), None)
            if holders is None:
                continue
            if parameter not in one.model_param_group_index_map:
                return None, [None] * len(MOMENTS), start, holders
            group, index = one.model_param_group_index_map[parameter]
            main = one.optimizer.param_groups[group]["params"][index]
            start = one._get_model_param_range_map(parameter)["param"].start
        main = parameter if main is None else main
        state = one.optimizer.state
        if main in state or any(main is p for g in one.optimizer.param_groups for p in g["params"]):
            return main.detach(), [state.get(main, {}).get(name) for name in MOMENTS], start, holders
    raise ConfigError("optimizer", type(optimizer).__name__, "must be that of the model, with pool_lock_step")
