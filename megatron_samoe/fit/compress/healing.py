"""Healing: the trainer with the original as teacher, banks first, then banks, coefficients and routers, then all weights.

Its baselines learn for the same number of steps: the models of equal bytes from the same teacher, and the original, with all
its weights at the same rate, from text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import OptimizerConfig, TrainingConfig
from megatron_samoe.errors import ConfigError


@dataclass(frozen=True)
class HealStage:
    """A run of training.

    Attributes:
        trained: pattern of the parameters that are trained, all others being frozen; None for all.
        is_taught: whether it learns from the teacher too.
    """

    name: str
    trained: str | None
    is_taught: bool = True


_SHARED = r"expert_pool\.|.*\.moe\.router\.|.*\.moe\.combination$"
#: In their order.
STAGES = (
    HealStage("healed-banks", r"expert_pool\."),
    HealStage("healed-routers", _SHARED),
    HealStage("healed-all", None),
)
#: By the model that they begin with, each for all steps of the stages together. The original has no teacher, which would
#: hold it where it is. A merged model is left out: the experts of a cluster, which count once, would come apart.
OTHERS = {
    "blind": HealStage("blind-healed", _SHARED),
    "pruned": HealStage("pruned-healed", r".*\.moe\.(experts|router)\."),
    "original": HealStage("original-longer", None, is_taught=False),
}


def other_stage(model: str, iters: Sequence[int]) -> HealStage:
    """Returns how a model that is compared heals: with all its weights if the compressed one does.

    Args:
        iters: steps of each stage.
    """
    return replace(OTHERS[model], trained=None) if iters[-1] else OTHERS[model]


#: Options of the original's optimizer that are not its schedule.
_KEPT = (
    "optimizer",
    "clip_grad",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "moe_router_lr_mult",
    "moe_expert_lr_mult",
    "moe_output_lr_mult",
    "optimizer_backend",
    *(f.name for f in fields(OptimizerConfig) if f.name.startswith("muon_")),
)


@dataclass(frozen=True)
class HealOptions:
    """How models heal.

    Attributes:
        lr: peak rate; that of the original's training if not given.
        batch_size: sequences of a step; those of the original's training if not given.
        teacher_weight: of the divergence from the teacher, which is added to the cross-entropy.
    """

    lr: float | None = None
    batch_size: int | None = None
    teacher_weight: float = 1.0


def require_rate_and_batch(original: PretrainConfig, options: HealOptions) -> None:
    """Raises ConfigError where a rate or a batch is to be the original's, and the original's are not known: a model from other
    files has the training options of this program's defaults.
    """
    plain = replace(TrainingConfig(), bf16=original.training.bf16, fp16=original.training.fp16)
    if original.optimizer != OptimizerConfig() or original.training != plain:
        return
    for flag, given in (("--heal-lr", options.lr), ("--heal-global-batch-size", options.batch_size)):
        if given is None:
            raise ConfigError(
                flag,
                None,
                "must be given: the model of --load-dir was not trained by this program, so that the rate "
                "and the batch of its training are not known",
            )


def _batch(original: PretrainConfig, trained: Mapping[str, Any], options: HealOptions) -> dict[str, int]:
    """Returns the batch of a step, and the largest micro-batch that divides it and is at most the original's.

    Args:
        trained: the original's training state, which has its batch where that followed from its ranks.
    """
    micro, steps, samples = (
        original.training.micro_batch_size,
        int(trained.get("iteration", 0)),
        int(trained.get("consumed_samples", 0)),
    )
    size = options.batch_size or original.training.global_batch_size or (samples // steps if steps else 0) or micro
    return {
        "micro_batch_size": next(b for b in range(min(micro, size), 0, -1) if size % b == 0),
        "global_batch_size": size,
    }


def heal_config(
    stage: HealStage,
    original: PretrainConfig,
    trained: Mapping[str, Any],
    options: HealOptions,
    start: Path,
    teacher: str,
    run_dir: Path,
    data: Mapping[str, Any],
    iters: int,
) -> Mapping[str, Any]:
    """Returns what the YAML file of a stage's run says: the model is the start's, batch, precision and optimizer the original's.

    Args:
        trained: the original's training state.
        data: options of the text to train and to validate on.
    """
    training, optimizer, default = original.training, original.optimizer, OptimizerConfig()
    kept = {name: getattr(optimizer, name) for name in _KEPT if getattr(optimizer, name) != getattr(default, name)}
    return {
        "checkpoint": {
            "pretrained_checkpoint": str(start),
            "use_checkpoint_args": True,
            "save_interval": max(1, iters // 4),
            "keep_last": 1,
        },
        "data": dict(data),
        "training": {
            **_batch(original, trained, options),
            "seed": training.seed,
            "bf16": training.bf16,
            "fp16": training.fp16,
            "num_threads": training.num_threads,
            "train_iters": iters,
            "eval_interval": iters,
            "eval_iters": 8,
        },
        "optimizer": {
            **kept,
            "lr": optimizer.lr if options.lr is None else options.lr,
            "lr_decay_style": "cosine",
            "lr_warmup_iters": min(iters // 10, 100),
            "weight_decay": 0.0,
            **({} if stage.trained is None else {"lr_mult_patterns": [f"^(?!{stage.trained})=0"]}),
        },
        **({"distillation": {"teacher": teacher, "teacher_weight": options.teacher_weight}} if stage.is_taught else {}),
        "logging": {"run_dir": str(run_dir), "log_interval": max(1, iters // 20)},
    }
