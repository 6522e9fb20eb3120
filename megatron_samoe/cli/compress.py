"""Makes a trained MoE smaller: the command line of `megatron-samoe compress`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from megatron_samoe import children
from megatron_samoe.cli.program import Count, program
from megatron_samoe.config.option import flag
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table, read_records
from megatron_samoe.fit.compress.healing import (
    OTHERS,
    STAGES,
    HealOptions,
    HealStage,
    heal_config,
    other_stage,
    require_rate_and_batch,
)
from megatron_samoe.fit.compress.judge import VERDICTS_FILE, Verdict, read_verdicts, verdict_table
from megatron_samoe.fit.compress.options import CompressOptions
from megatron_samoe.fit.compress.pipeline import Compression
from megatron_samoe.fit.compress.report import Compressed, write_compression_report
from megatron_samoe.log import configure_logging, logger


@dataclass(frozen=True, kw_only=True)
class Compress(CompressOptions):
    """Makes a trained MoE smaller: its layers come to share experts, which are matched, fitted on text, and healed by training.

        megatron-samoe compress --load-dir runs/moe --save-dir runs/half --data-path runs/corpus_text_document --budget 0.5

    Stages leave their results in --save-dir, so that the same command resumes: calibration, plan, matched,
    fitted, others, healed-banks, healed-routers, healed-all, judged. One process, except for healing. docs/compression.md explains them.
    """

    sharing: Annotated[str, tyro.conf.arg(name="expert-sharing", metavar="MAP")] = "combined"
    """combined, tied, scaled, or a map such as own,0*3,own"""
    num_banks: Annotated[int, tyro.conf.arg(name="num-expert-banks", metavar="P")] = 1
    """banks of experts that layers combine, for --expert-sharing combined"""
    num_sets: Annotated[int, tyro.conf.arg(name="num-expert-sets", metavar="N")] = 1
    """sets of experts that layers share, for --expert-sharing tied or scaled"""
    heal_iters: tuple[int, ...] = ()
    """steps of training: of banks only, then of banks, coefficients and routers, then of all weights"""
    heal_lr: float | None = None
    """peak learning rate of healing; that of the original's training if not given"""
    teacher: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """model to learn from; the original if not given"""
    teacher_weight: float = 1.0
    """weight of the KL divergence from the teacher in the loss"""
    heal_global_batch_size: Count = None
    """sequences of a step; those of the original's training if not given"""
    no_heal_others: bool = False
    """leave out the baselines' healing, and the original's training for the same steps"""
    heal_others_lr: float | None = None
    """peak learning rate of healing the baselines; --heal-lr if not given"""
    beside: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR [DIR ...]")] = ()
    """folders of other compressions of the same model, for the picture of loss against bytes"""

    def run(self) -> None:
        """Fits the shared experts, heals them and the baselines, judges all on text, and writes the report."""
        configure_logging()
        iters = self._heal_iters()
        compression = Compression(self)
        earlier = _verdicts_of(self.beside, compression)
        options = HealOptions(self.heal_lr, self.heal_global_batch_size, self.teacher_weight)
        if sum(iters):
            require_rate_and_batch(compression.config, options)
        teacher = self.teacher or str(compression.directory)
        compression.require_teacher(teacher)
        heal = partial(_heal, compression, teacher)
        start = compression.fitted().directory
        compressed = {"fitted": start}
        for stage, count in zip(STAGES, iters, strict=True):
            if count:
                compressed[stage.name] = start = heal(options, stage, start, count)
        healed = {name: folder for name, folder in compressed.items() if name != "fitted"}
        if sum(iters) and not self.no_heal_others:
            healed |= self._heal_baselines(compression, heal, options, iters)
        verdicts = compression.judge(healed)
        logger.info(f"\n{format_table(verdict_table(verdicts))}")
        _write_results(compression, verdicts, [*healed], earlier)
        best = min((v for v in verdicts if v.model in compressed), key=lambda verdict: verdict.loss).model
        logger.info(
            f"\nIn {self.save_dir}: {VERDICTS_FILE}, report.html; the model of the lowest loss, {best}, is in {compressed[best]}"
        )

    def _heal_baselines(
        self, compression: Compression, heal: Callable[..., Path], options: HealOptions, iters: Sequence[int]
    ) -> dict[str, Path]:
        """Returns the folders of the original and of the models that were made by other means, trained as long."""
        rate = options.lr if self.heal_others_lr is None else self.heal_others_lr
        return {
            OTHERS[name].name: heal(
                options if name == "original" else replace(options, lr=rate),
                other_stage(name, iters),
                compression.folder_of(name),
                sum(iters),
            )
            for name in ("original", *compression.others())
            if name in OTHERS
        }

    def _heal_iters(self) -> tuple[int, ...]:
        iters = (*self.heal_iters, *(0 for _ in STAGES))
        if len(self.heal_iters) > len(STAGES) or min(iters) < 0:
            raise ConfigError("--heal-iters", self.heal_iters, "must be one to three numbers of steps, 0 or more")
        for name in ("heal_lr", "heal_global_batch_size", "teacher", "no_heal_others", "heal_others_lr"):
            if getattr(self, name) and not sum(iters):
                raise ConfigError(flag(name), getattr(self, name), "needs --heal-iters")
        if self.heal_others_lr is not None and self.no_heal_others:
            raise ConfigError("--heal-others-lr", self.heal_others_lr, "has no use with --no-heal-others")
        for name in ("heal_lr", "heal_others_lr", "heal_global_batch_size"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(flag(name), getattr(self, name), "must be above 0")
        return iters[: len(STAGES)]


def _verdicts_of(folders: Sequence[str], compression: Compression) -> list[list[Verdict]]:
    """Returns the verdicts of other compressions; ConfigError for one of another model."""
    found = []
    for folder in folders:
        verdicts = read_verdicts(Path(folder))
        if verdicts[0].expert_bytes != compression.layer_bytes * compression.num_layers:
            raise ConfigError(
                "--beside", folder, "is a compression of another model: its original has other expert bytes"
            )
        found.append(verdicts)
    return found


def _write_results(
    compression: Compression, verdicts: list[Verdict], healed: Sequence[str], earlier: list[list[Verdict]]
) -> None:
    """Writes the verdicts as JSON, and the report with the courses of healing and earlier compressions' verdicts."""
    root, plan = compression.folder.root, compression.plan
    found = {
        "sharing": plan.sharing,
        "num_expert_banks": plan.num_banks,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    (root / VERDICTS_FILE).write_text(json.dumps(found, indent=1) + "\n")
    courses = {name: [r for r in read_records(root / name / "metrics.jsonl") if "lm_loss" in r] for name in healed}
    write_compression_report(root / "report.html", Compressed(verdicts, *compression.errors(), courses, earlier))


def _heal(
    compression: Compression, teacher: str, options: HealOptions, stage: HealStage, start: Path, iters: int
) -> Path:
    """Trains a model on, from its last checkpoint, and returns the folder of what it becomes.

    Raises:
        MegatronSamoeError: training failed, and said why.
    """
    root = compression.folder.root
    run_dir, path = root / stage.name, root / f"{stage.name}.yaml"
    config = heal_config(
        stage,
        compression.config,
        compression.source.train_state,
        options,
        start.parent,
        teacher,
        run_dir,
        compression.texts.training,
        iters,
    )
    text = yaml.safe_dump(dict(config), sort_keys=False)
    if path.is_file() and path.read_text() != text:
        raise ConfigError(
            "--heal-iters",
            iters,
            f"this or another option of healing differs from {path}; use the same, or delete it and {run_dir} to train again",
        )
    if not path.is_file():
        later = STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()
        if stale := [str(root / s.name) for s in later if (root / f"{s.name}.yaml").is_file()]:
            raise ConfigError(
                "--heal-iters",
                iters,
                f"{stage.name} would be trained, and {stale[0]} began with another; delete {stale[0]} and {stale[0]}.yaml",
            )
        compression.folder.forget(f"judged-{stage.name}")  # of a run that was deleted
    path.write_text(text)
    logger.info(f"{stage.name}: megatron-samoe pretrain --config {shlex.quote(str(path))}")
    # A process of its own: the trainer keeps freed memory, and the stages before may have taken much.
    if children.run([sys.executable, "-m", "megatron_samoe", "pretrain", "--config", str(path)]).returncode != 0:
        newest = newest_in_words(run_dir / "checkpoints")
        raise MegatronSamoeError(f"{stage.name} has not ended; the same command resumes it. {newest}")
    return open_folder(run_dir / "checkpoints").directory


main = program(Compress)

if __name__ == "__main__":
    sys.exit(main())
