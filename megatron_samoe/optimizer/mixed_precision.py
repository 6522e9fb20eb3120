"""The optimizer (AdamW or another update) over fp32 master weights for parameters of any precision, and fp16's loss
scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_samoe.config.training import OptimizerConfig, TrainingConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.adamw import serves as adamw_serves
from megatron_samoe.optimizer.expert_order import reorder_experts
from megatron_samoe.optimizer.param_groups import ParamGroup, ParamRule, build_param_groups
from megatron_samoe.optimizer.update import apply_update
from megatron_samoe.optimizer.whole_tensors import Shard, WholeTensors
from megatron_samoe.parallel_state.parameter_tag import shard_shape, tag_of
from megatron_samoe.parallel_state.state import ParallelState, single_process_state

MOMENTS = ("exp_avg", "exp_avg_sq")


class MixedPrecisionOptimizer:
    """Updates weights from main gradients. Weights in fp32 (and always the pool's) are their own master weights.

    AdamW is one compiled pass over masters, moments and bf16 weights on a CPU; elsewhere apex or torch do it.

    Args:
        buffers: the gradients; this rank updates their pieces.
        state: this rank's parallel state; needed where an update needs full tensors.
        rules: the rules of parameter groups; those of the configuration if not given.

    Attributes:
        pieces: what this rank updates, by parameter name; frozen parameters are left out.
    """

    def __init__(
        self,
        buffers: GradBuffers,
        config: OptimizerConfig,
        state: ParallelState | None = None,
        rules: tuple[ParamRule, ...] | None = None,
    ):
        self.buffers, self.config, self._state = buffers, config, state or single_process_state()
        groups = [g for g in build_param_groups(buffers.parameters, config, rules) if not g.is_frozen]
        self._trained = {name for group in groups for name in group.names}
        self.pieces = {piece.name: piece for piece in buffers.pieces if piece.name in self._trained}
        self.masters: dict[str, Tensor] = {}
        for name, piece in self.pieces.items():
            is_own_master = piece.weight.dtype in (torch.float32, torch.float64)
            self.masters[name] = piece.weight if is_own_master else piece.weight.float()
        self.num_steps = 0
        self._others = [group for group in groups if group.update is not None]
        turns: dict[str, int] = {}
        self._whole = [self._whole_tensors(group, turns) for group in self._others]
        self._groups = [
            replace(group, names=tuple(name for name in group.names if name in self.pieces))
            for group in groups
            if group.update is None
        ]
        self._moments = {
            name: tuple(group.update.moments) for group in self._others if group.update for name in group.names
        }
        self._states = {
            name: {moment: torch.zeros_like(master) for moment in self._moments.get(name, MOMENTS)}
            for name, master in self.masters.items()
        }
        by_adam = [name for group in self._groups for name in group.names]
        for name in by_adam:
            self._states[name]["step"] = torch.zeros((), dtype=torch.float32, device=self.masters[name].device)
        self._runs = {name: self._run(name) for name in by_adam}
        self._inner = None if self._is_compiled() else self._make_inner()

    def _shard(self, name: str) -> Shard:
        p = self.buffers.parameters[name]
        return Shard(tag_of(p), shard_shape(p), p.main_grad)  # type: ignore[attr-defined]

    def _run(self, name: str) -> AdamWRun:
        piece, master, state = self.pieces[name], self.masters[name], self._states[name]
        weight = piece.weight if piece.weight.dtype == torch.bfloat16 else None
        return AdamWRun(master, weight, piece.grad, *(state[moment] for moment in MOMENTS))

    def _whole_tensors(self, group: ParamGroup, turns: dict[str, int]) -> WholeTensors | None:
        if group.update is None or not group.update.needs_whole:
            return None
        shards = {name: self._shard(name) for name in group.names}
        for name, shard in shards.items():
            if len(shard.tensor_shape) < 2:
                kind = type(group.update).__name__
                raise ConfigError(
                    f"update of {name}",
                    kind,
                    f"must be an update of single elements: {name} {list(shard.shape)} is not a matrix",
                )
        return WholeTensors(shards, self.pieces, self._state, turns)

    def _is_compiled(self) -> bool:
        return self.config.optimizer_backend == "auto" and adamw_serves(list(self._runs.values()))

    def _make_inner(self) -> torch.optim.Optimizer | None:
        groups = [
            {"params": [self.masters[n] for n in g.names], "weight_decay": g.weight_decay, "lr_mult": g.lr_mult}
            for g in self._groups
            if g.names
        ]
        if not groups:
            return None
        inner = _make_adam(groups, self.config)
        for name in self._runs:
            inner.state[self.masters[name]] = self._states[name]
        return inner

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Updates all parameters from their main gradients; ranks that hold shards of buffers call it together.

        Args:
            grad_scale: factor on the gradients (clipping). The compiled pass applies it as it reads them and leaves the
                main gradients unchanged; otherwise they are scaled in place.
        """
        self.num_steps += 1
        if self._inner is not None:
            if grad_scale != 1:
                self.buffers.scale(grad_scale)
                grad_scale = 1.0
            self._step_inner(self._inner, lr)
        else:
            config = self.config
            for group in self._groups:
                rates = AdamWRates(
                    lr * group.lr_mult,
                    config.adam_beta1,
                    config.adam_beta2,
                    config.adam_eps,
                    group.weight_decay,
                    grad_scale,
                )
                adamw([self._runs[name] for name in group.names], rates, self.num_steps)
        for group, full in zip(self._others, self._whole, strict=True):
            assert group.update is not None
            factors = (lr * group.lr_mult, group.weight_decay, grad_scale)
            pieces = {name: self.pieces[name] for name in group.names if name in self.pieces}
            apply_update(group.update, full, pieces, self.masters, self._states, factors, self.num_steps)
        for name, master in self.own_masters().items():
            if self._inner is not None or name not in self._runs or self._runs[name].weight is None:
                self.pieces[name].weight.copy_(master)
        self.buffers.gather_weights()

    @torch.no_grad()
    def reorder_experts(self, parameters: Mapping[str, nn.Parameter], dims: Mapping[str, int], order_E: Tensor) -> None:
        """Reorders experts: weights, master weights and moments. Ranks call it together.

        Args:
            parameters: all of the rank, by global name.
            dims: the experts' dim of each parameter that has one, in the same order on all ranks of its groups.
            order_E: the expert that each index is to have.
        """
        for name, dim in dims.items():
            parameter, tag = parameters[name], tag_of(parameters[name])
            tensors: list[Tensor | None] = [parameter.detach()]
            held, like = tag.slice, parameter.detach()
            if name in self._trained:
                piece, state = self.pieces.get(name), self._states.get(name, {})
                tensors = [self.masters.get(name)]
                tensors += [state.get(moment) for moment in self._moments.get(name, MOMENTS)]
                held, like = None if piece is None else piece.slice, parameter.main_grad  # type: ignore[attr-defined]
            reorder_experts(tensors, held, tag, shard_shape(parameter), dim, order_E, self._state, like)
        for name, master in self.own_masters().items():
            self.pieces[name].weight.copy_(master)
        self.buffers.gather_weights()

    def _step_inner(self, inner: torch.optim.Optimizer, lr: float) -> None:
        for group in inner.param_groups:
            group["lr"] = lr * group["lr_mult"]
        for name in self._runs:
            self.masters[name].grad = self.pieces[name].grad
        inner.step()
        for name in self._runs:
            self.masters[name].grad = None

    def moments(self, name: str) -> dict[str, Tensor]:
        """Returns the moments of this rank's piece of a parameter, by name, each in the piece's shape."""
        return {moment: self._states[name][moment] for moment in self._moments.get(name, MOMENTS)}

    def own_masters(self) -> dict[str, Tensor]:
        """Returns the master weights that are not the weights themselves, by parameter name."""
        return {n: m for n, m in self.masters.items() if m.dtype != self.pieces[n].weight.dtype}

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the step count that Adam's bias correction uses, after loading."""
        self.num_steps = num_steps
        for name in self._runs:
            self._states[name]["step"].fill_(float(num_steps))
        for group in self._inner.param_groups if self._inner is not None else []:
            if "step" in group or type(self._inner).__module__.startswith("apex"):
                group["step"] = num_steps

    def refresh_masters(self) -> None:
        """Sets master weights from the weights, after these were loaded without optimizer state."""
        for name, master in self.own_masters().items():
            master.copy_(self.pieces[name].weight)


def _make_adam(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    betas = (config.adam_beta1, config.adam_beta2)
    on_cuda = groups[0]["params"][0].is_cuda
    if config.optimizer_backend == "apex" or (config.optimizer_backend == "auto" and on_cuda):
        try:
            from apex.optimizers import FusedAdam

            return FusedAdam(groups, lr=config.lr, betas=betas, eps=config.adam_eps, adam_w_mode=True)
        except ImportError:
            if config.optimizer_backend == "apex":
                raise ConfigError(
                    "--optimizer-backend",
                    "apex",
                    "NVIDIA's apex with its CUDA extensions is not importable (PyPI's apex is another project); use torch",
                ) from None
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


@dataclass(frozen=True)
class LossScale:
    """The factor on fp16 losses: halved when a gradient overflows, doubled after a number of good steps.

    Attributes:
        good_steps: steps since the last change.
        growth_interval: good steps before the factor is doubled; 0 for a fixed factor.
    """

    value: float = 1.0
    good_steps: int = 0
    growth_interval: int = 0

    @staticmethod
    def of(config: TrainingConfig) -> LossScale:
        """Returns the scale that a run starts with; 1 without fp16."""
        if not config.fp16:
            return LossScale()
        if config.loss_scale is not None:
            return LossScale(config.loss_scale)
        return LossScale(config.initial_loss_scale, growth_interval=1000)

    def after(self, overflow: bool) -> LossScale:
        """Returns the scale for the next step."""
        if self.growth_interval == 0:
            return self
        if overflow:
            return replace(self, value=max(self.value / 2, 1.0), good_steps=0)
        if self.good_steps + 1 == self.growth_interval:
            return replace(self, value=self.value * 2, good_steps=0)
        return replace(self, good_steps=self.good_steps + 1)
