"""AdamW over fp32 master weights, for parameters of any precision, and the loss scale of fp16."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_samoe.config.training import OptimizerConfig, TrainingConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.adamw import serves as adamw_serves
from megatron_samoe.optimizer.param_groups import build_param_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class MixedPrecisionOptimizer:
    """AdamW on main gradients. Weights in fp32 (and the pool, always) are their own master weights.

    On a CPU one compiled pass updates masters, moments and bf16 weights; elsewhere apex or torch do.

    Args:
        buffers: the gradients; what this rank updates are their pieces.
    """

    def __init__(self, buffers: GradBuffers, config: OptimizerConfig):
        self.buffers, self.config = buffers, config
        self.pieces = {piece.name: piece for piece in buffers.pieces}
        self.masters: dict[str, Tensor] = {}
        for name, piece in self.pieces.items():
            is_own_master = piece.weight.dtype in (torch.float32, torch.float64)
            self.masters[name] = piece.weight if is_own_master else piece.weight.float()
        self.num_steps = 0
        self._states = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }
            for name, master in self.masters.items()
        }
        self._groups = build_param_groups(list(self.pieces), config)
        self._runs = {name: self._run(name) for name in self.pieces}
        self._inner = None if self._is_compiled() else self._make_inner()

    def _run(self, name: str) -> AdamWRun:
        piece, master, state = self.pieces[name], self.masters[name], self._states[name]
        weight = piece.weight if piece.weight.dtype == torch.bfloat16 else None
        return AdamWRun(master, weight, piece.grad, *(state[moment] for moment in MOMENTS))

    def _is_compiled(self) -> bool:
        return self.config.optimizer_backend == "auto" and adamw_serves(list(self._runs.values()))

    def _make_inner(self) -> torch.optim.Optimizer | None:
        groups = [
            {"params": [self.masters[n] for n in g.names], "weight_decay": g.weight_decay, "lr_mult": g.lr_mult}
            for g in self._groups
        ]
        if not groups:
            return None
        inner = _make_adam(groups, self.config)
        for name, master in self.masters.items():
            inner.state[master] = self._states[name]
        return inner

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Updates all parameters from their main gradients; ranks that share elements out call it together.

        Args:
            grad_scale: multiplies the gradients (clipping). The compiled pass does so as it reads them, and leaves the
                main gradients as they were; otherwise they are scaled in place.
        """
        self.num_steps += 1
        if self._inner is not None:
            if grad_scale != 1:
                self.buffers.scale(grad_scale)
            self._step_inner(self._inner, lr)
        else:
            config = self.config
            for group in self._groups:
                rates = AdamWRates(
                    lr * group.lr_mult, config.adam_beta1, config.adam_beta2, config.adam_eps, group.weight_decay,
                    grad_scale,
                )  # fmt: skip
                adamw([self._runs[name] for name in group.names], rates, self.num_steps)
        for name, master in self.own_masters().items():
            if self._inner is not None or self._runs[name].weight is None:
                self.pieces[name].weight.copy_(master)
        self.buffers.gather_weights()

    def _step_inner(self, inner: torch.optim.Optimizer, lr: float) -> None:
        for group in inner.param_groups:
            group["lr"] = lr * group["lr_mult"]
        for name, master in self.masters.items():
            master.grad = self.pieces[name].grad
        inner.step()
        for master in self.masters.values():
            master.grad = None

    def moments(self, name: str) -> dict[str, Tensor]:
        """Returns the moments of what this rank updates of a parameter."""
        return {moment: self._states[name][moment] for moment in MOMENTS}

    def own_masters(self) -> dict[str, Tensor]:
        """Returns master weights that are not the weights themselves."""
        return {n: m for n, m in self.masters.items() if m.dtype != self.pieces[n].weight.dtype}

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the step count that Adam's bias correction uses, after loading."""
        self.num_steps = num_steps
        for state in self._states.values():
            state["step"].fill_(float(num_steps))
        for group in self._inner.param_groups if self._inner is not None else []:
            if "step" in group or type(self._inner).__module__.startswith("apex"):
                group["step"] = num_steps

    def refresh_masters(self) -> None:
        """Takes master weights from the weights, after those were loaded without optimizer state."""
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
                    "--optimizer-backend", "apex",
                    "NVIDIA's apex with its CUDA extensions is not importable (PyPI's apex is another project); use torch",
                ) from None  # fmt: skip
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


@dataclass(frozen=True)
class LossScale:
    """Factor on fp16 losses: halved when a gradient overflows, doubled after a run of good steps.

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
