"""The complete configuration of a pretraining run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.training import DistillationConfig, LoggingConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what a run computes, in groups."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Its experts."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The parallel layout."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training loop."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """The teacher."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Logs."""

    @property
    def expert_ffn_size(self) -> int:
        """F of one routed expert."""
        return self.moe.ffn_size(self.model.mlp_size)

    @property
    def shared_expert_size(self) -> int | None:
        """Width of the shared expert that every token of an MoE layer passes; None without one."""
        width = self.moe.moe_shared_expert_intermediate_size
        return self.model.mlp_size if width is None and self.moe.moe_residual_mlp else width

    def folder_of(self, name: str) -> Path | None:
        """Returns a folder for files that ranks leave behind, if the run has a folder."""
        folder = self.logging.run_dir or self.checkpoint.save
        return None if folder is None else Path(folder) / name

    def with_run_dir(self) -> PretrainConfig:
        """Returns the configuration with the paths that --run-dir implies filled in."""
        if self.logging.run_dir is None:
            return self
        run = Path(self.logging.run_dir)
        logs, checkpoint = self.logging, self.checkpoint
        return replace(
            self,
            logging=replace(
                logs,
                tensorboard_dir=logs.tensorboard_dir or str(run / "tensorboard"),
                metrics_file=logs.metrics_file or str(run / "metrics.jsonl"),
            ),
            checkpoint=replace(
                checkpoint,
                save=checkpoint.save or str(run / "checkpoints"),
                load=checkpoint.load or str(run / "checkpoints"),
            ),
        )
