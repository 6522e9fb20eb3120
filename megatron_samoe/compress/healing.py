"""Healing: the trainer with the original as teacher, banks first, then banks, coefficients and routers.

What it is compared with learns by as many steps: the models of as many bytes from the same teacher, and the original from text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.config.pretrain import PretrainConfig


@dataclass(frozen=True)
class HealStage:
    """A run of training.

    Attributes:
        trained: pattern of the parameters that are trained; all others are frozen.
        share: peak rate over that of the original's training, if none is given.
        is_taught: whether it learns from the teacher too.
    """

    name: str
    trained: str
    share: float = 1.0
    is_taught: bool = True


_SHARED = r"expert_pool\.|.*\.moe\.router\.|.*\.moe\.combination$"
_OWN = r".*\.moe\.(experts|router)\."
#: In their order.
STAGES = (HealStage("healed-banks", r"expert_pool\."), HealStage("healed-routers", _SHARED))
#: By the model that they begin with, each by as many steps as the stages have together. The original is at the end of its
#: training, and goes on at a low rate. A merged model is left out: the experts of a cluster, which count once, would come apart.
OTHERS = {
    "blind": HealStage("blind-healed", _SHARED),
    "pruned": HealStage("pruned-healed", _OWN),
    "original": HealStage("original-longer", _OWN, share=1 / 15, is_taught=False),
}


@dataclass(frozen=True)
class HealOptions:
    """How a model heals.

    Attributes:
        lr: peak rate; the stage's share of that of the original's training if not given.
        teacher_weight: of the divergence from the teacher beside the cross-entropy.
    """

    lr: float | None = None
    teacher_weight: float = 1.0


def heal_config(
    stage: HealStage, original: PretrainConfig, options: HealOptions, start: Path, teacher: str, run_dir: Path,
    data_path: str, valid_data_path: str | None, iters: int,
) -> Mapping[str, Any]:  # fmt: skip
    """Returns what the YAML file of a stage's run says: the model is the start's, batch and precision the original's."""
    training, optimizer = original.training, original.optimizer
    data = {"train_data_path": [data_path]} | (
        {} if valid_data_path is None else {"valid_data_path": [valid_data_path]}
    )
    kept = ("micro_batch_size", "global_batch_size", "seed", "bf16", "num_threads")
    return {
        "checkpoint": {"pretrained_checkpoint": str(start), "use_checkpoint_args": True, "save_interval": max(1, iters // 4),
                       "keep_last": 1},
        "data": data,
        "training": {**{name: getattr(training, name) for name in kept}, "train_iters": iters, "eval_interval": iters,
                     "eval_iters": 0 if valid_data_path is None else 8},
        "optimizer": {"lr": options.lr or optimizer.lr * stage.share, "lr_decay_style": "cosine", "lr_warmup_iters": min(iters // 10, 100),
                      "weight_decay": 0.0, "lr_mult_patterns": [f"^(?!{stage.trained})=0"]},
        **({"distillation": {"teacher": teacher, "teacher_weight": options.teacher_weight}} if stage.is_taught else {}),
        "logging": {"run_dir": str(run_dir), "log_interval": max(1, iters // 20)},
    }  # fmt: skip
