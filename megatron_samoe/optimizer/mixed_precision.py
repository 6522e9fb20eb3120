"""AdamW over fp32 master weights, for parameters of any precision, and the loss scale of fp16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_samoe.config.training import OptimizerConfig, TrainingConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.optimizer.param_groups import build_param_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class MixedPrecisionOptimizer:
    """AdamW on main gradients. Parameters in fp32 (and the pool, always) are their own master weights.

    Args:
        parameters: by global name, with main gradients.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig):
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            is_own_master = p.dtype in (torch.float32, torch.float64)
            self.masters[name] = p.detach() if is_own_master else p.detach().float()
        groups = [
            {"params": [self.masters[n] for n in g.names], "weight_decay": g.weight_decay, "lr_mult": g.lr_mult}
            for g in build_param_groups(self.parameters, config)
        ]
        self.inner = _make_adam(groups, config)
        self.num_steps = 0
        for master in self.masters.values():
            self.inner.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates all parameters from their main gradients."""
        for group in self.inner.param_groups:
            group["lr"] = lr * group["lr_mult"]
        for name, master in self.masters.items():
            master.grad = self.parameters[name].main_grad  # type: ignore[attr-defined]
        self.inner.step()
        for name, master in self.masters.items():
            master.grad = None
            if master.dtype != self.parameters[name].dtype:
                self.parameters[name].copy_(master)
        self.num_steps += 1

    def moments(self, name: str) -> dict[str, Tensor]:
        """Returns a parameter's moments, shaped like the parameter."""
        state = self.inner.state[self.masters[name]]
        return {moment: state[moment] for moment in MOMENTS}

    def own_masters(self) -> dict[str, Tensor]:
        """Returns master weights that are not the parameters themselves."""
        return {n: m for n, m in self.masters.items() if m.dtype != self.parameters[n].dtype}

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the step count that Adam's bias correction uses, after loading."""
        self.num_steps = num_steps
        for master in self.masters.values():
            self.inner.state[master]["step"].fill_(float(num_steps))
        for group in self.inner.param_groups:
            if "step" in group or type(self.inner).__module__.startswith("apex"):
                group["step"] = num_steps

    def refresh_masters(self) -> None:
        """Takes master weights from the parameters, after weights were loaded without optimizer state."""
        for name, master in self.own_masters().items():
            master.copy_(self.parameters[name])


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
