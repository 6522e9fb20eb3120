"""The hooks of a run: what its configuration asks for."""

from __future__ import annotations

from pathlib import Path

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.training.hook import Hook
from megatron_samoe.training.hooks.coefficient_watch import CoefficientWatch
from megatron_samoe.training.hooks.evaluation import Evaluation
from megatron_samoe.training.hooks.exit_signals import ExitSignals
from megatron_samoe.training.hooks.loggers import ConsoleLog, MetricsFile, ProgressBar, TensorBoard, Tracker
from megatron_samoe.training.hooks.moe_diagnostics import LayerDiagnostics
from megatron_samoe.training.hooks.profiling import StepProfiler
from megatron_samoe.training.hooks.replica_check import ReplicaCheck
from megatron_samoe.training.hooks.router_watch import RouterWatch
from megatron_samoe.training.hooks.step_warnings import StepWarnings


def default_hooks(config: PretrainConfig) -> list[Hook]:
    """Returns the hooks that a configuration asks for, in the order in which they are called."""
    logs, iters, trains = config.logging, config.training.train_iters, not config.training.skip_train
    hooks: list[Hook] = [ExitSignals()]
    if logs.log_progress:
        name = Path(logs.run_dir).name if logs.run_dir else config.moe.expert_layout
        hooks.append(ProgressBar(iters, name))
    else:
        hooks.append(ConsoleLog(iters))
    if logs.metrics_file:
        hooks.append(MetricsFile(logs.metrics_file, trains))
    if not trains:
        return hooks
    if logs.tensorboard_dir:
        hooks.append(TensorBoard(logs.tensorboard_dir))
    for library, project in (("wandb", logs.wandb_project), ("trackio", logs.trackio_project)):
        if project is not None:
            run = logs.exp_name or (Path(logs.run_dir).name if logs.run_dir else None)
            hooks.append(Tracker(library, project, run, to_mapping(config)))
    if logs.profile:
        hooks.append(StepProfiler(logs))
    if config.moe.expert_layout != "dense":
        hooks.append(RouterWatch(config))
        moe = config.moe
        # A factor on a set is never normalised.
        can_vanish = moe.samoe_normalization == "none" or any(way.mixes and way.in_sets for way in moe.ways)
        if moe.has_coefficients and can_vanish and not moe.samoe_freeze_coefficients:
            hooks.append(CoefficientWatch(moe))
        if logs.moe_per_layer_logging:
            hooks.append(LayerDiagnostics())
    if config.moe.pool_replica_check_interval is not None:
        hooks.append(ReplicaCheck(config.moe.pool_replica_check_interval))
    if config.training.eval_iters:
        hooks.append(Evaluation())
    return [*hooks, StepWarnings()]
