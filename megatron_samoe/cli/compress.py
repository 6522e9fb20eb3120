"""Makes a trained MoE smaller: its layers come to share experts, which are matched, fitted on text, and healed by training.

    megatron-samoe compress --load-dir runs/moe --save-dir runs/half --data-path runs/corpus --budget 0.5

Stages leave their results in --save-dir, so that the same command goes on where it was cut off: calibration, plan, matched,
fitted, others, healed-banks, healed-routers, judged. One process. docs/compression.md explains them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import yaml

from megatron_samoe import children
from megatron_samoe.cli.arguments import Options, Words, adder, program, text_parser
from megatron_samoe.convert.edited_model import open_checkpoint
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table, read_records
from megatron_samoe.fit.compress.healing import (
    OTHERS,
    STAGES,
    HealOptions,
    HealStage,
    heal_config,
    require_rate_and_batch,
)
from megatron_samoe.fit.compress.judge import VERDICTS_FILE, Verdict, read_verdicts, verdict_table
from megatron_samoe.fit.compress.options import CompressOptions
from megatron_samoe.fit.compress.pipeline import Compression
from megatron_samoe.fit.compress.report import Compressed, write_compression_report
from megatron_samoe.log import configure_logging, logger


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser, default = text_parser(__doc__), CompressOptions("", "", "")
    add = adder(parser)
    add("--load-dir", str, "the MoE: folder of a run or of checkpoints", required=True, metavar="DIR")
    add("--ckpt-step", int, "iteration; the newest if not given", metavar="N")
    add("--save-dir", str, "folder of all results", required=True, metavar="DIR")
    text = adder(parser.add_argument_group("text"))
    text("--data-path", str, "indexed dataset to calibrate on, and to heal on", required=True, metavar="PREFIX")
    text("--calibration-tokens", default.calibration_tokens, "its first tokens that are read", metavar="N")
    text("--valid-data-path", str, "indexed dataset to judge on; the last documents of --data-path, held out, if not given",
         metavar="PREFIX")  # fmt: skip
    text("--judge-tokens", default.judge_tokens, "tokens to judge on", metavar="N")
    text("--num-samples", default.num_samples, "tokens kept of each expert, to match outputs on", metavar="N")
    text("--seed", default.seed, "of the lot that keeps them")
    share = adder(parser.add_argument_group("sharing"))
    share("--expert-sharing", default.sharing, "combined, tied, scaled, or a map such as own,0*3,own", metavar="MAP")
    share("--num-expert-banks", default.num_banks, "of layers that combine", metavar="P")
    share("--num-expert-sets", default.num_sets, "of tied or scaled", metavar="N")
    share("--budget", float, "share of all expert bytes below 1, or bytes, in place of these numbers", metavar="X")
    share("--choose-map", bool, "choose the neighbouring layers that share a set by what pairs of layers lose")
    share(
        "--match",
        ("neurons", "experts", "none"),
        "what gets a common numbering: experts and their neurons, experts alone",
    )
    share("--no-refit", bool, "fit w2 to the weights, not to the outputs from what the fitted w1 gives")
    heal = adder(parser.add_argument_group("healing"))
    heal(
        "--heal-iters", [int], "steps of training: of banks alone, then of banks, coefficients and routers", metavar="N"
    )
    heal("--heal-lr", float, "peak rate; that of the original's training if not given")
    heal("--teacher", str, "model to learn from; the original if not given", metavar="DIR")
    heal("--teacher-weight", 1.0, "of the divergence from the teacher, beside the cross-entropy")
    heal(
        "--heal-global-batch-size",
        int,
        "sequences of a step; those of the original's training if not given",
        metavar="N",
    )
    heal(
        "--no-heal-others",
        bool,
        "leave out healing what it is compared with, and training the original on, by as many steps",
    )
    heal("--heal-others-lr", float, "peak rate of the healed pruned and blind models; --heal-lr if not given")
    add(
        "--beside",
        [str],
        "folders of other compressions of the same model, for the picture of loss against bytes",
        metavar="DIR",
    )
    return parser


@program
def main(words: Words) -> None:
    """Runs the command."""
    configure_logging()
    options = make_parser().parse_args(words)
    iters = _heal_iters(options)
    given = {f.name: getattr(options, f.name) for f in fields(CompressOptions) if hasattr(options, f.name)}
    compression = Compression(CompressOptions(
        **given, sharing=options.expert_sharing, num_banks=options.num_expert_banks, num_sets=options.num_expert_sets,
        refit=not options.no_refit,
    ))  # fmt: skip
    beside = _beside(options.beside or [], compression)
    own = HealOptions(options.heal_lr, options.heal_global_batch_size, options.teacher_weight)
    if sum(iters):
        require_rate_and_batch(compression.config, own)
    teacher = options.teacher or str(compression.source.directory)
    compression.require_teacher(teacher)
    fitted = compression.fitted().directory
    heal = partial(_heal, compression, teacher)
    start, healed = fitted, {}
    for stage, count in zip(STAGES, iters, strict=True):
        if count:
            healed[stage.name] = start = heal(own, stage, start, count)
    if sum(iters) and not options.no_heal_others:
        others = own if options.heal_others_lr is None else replace(own, lr=options.heal_others_lr)
        for name in ("original", *compression.others()):
            if name in OTHERS:
                its = own if name == "original" else others
                healed[OTHERS[name].name] = heal(its, OTHERS[name], compression.folder_of(name), sum(iters))
    verdicts = compression.judge(healed)
    logger.info(f"\n{format_table(verdict_table(verdicts))}")
    report = {"sharing": compression.plan.sharing, "num_expert_banks": compression.plan.num_banks,
              "verdicts": [verdict.to_json() for verdict in verdicts]}  # fmt: skip
    root = compression.folder.root
    (root / VERDICTS_FILE).write_text(json.dumps(report, indent=1) + "\n")
    healing = {name: [r for r in read_records(root / name / "metrics.jsonl") if "lm_loss" in r] for name in healed}
    write_compression_report(root / "report.html", Compressed(verdicts, *compression.errors(), healing, beside))
    logger.info(f"\nIn {root}: {VERDICTS_FILE}, report.html; the model is in {start}")


def _beside(folders: Sequence[str], compression: Compression) -> list[list[Verdict]]:
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


def _heal_iters(options: Options) -> tuple[int, int]:
    iters = (*(options.heal_iters or ()), 0, 0)
    if len(iters) > 4 or min(iters) < 0:
        raise ConfigError("--heal-iters", options.heal_iters, "must be one or two numbers of steps, 0 or more")
    for name in ("heal_lr", "heal_global_batch_size", "teacher", "no_heal_others", "heal_others_lr"):
        if getattr(options, name) and not sum(iters):
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "needs --heal-iters")
    if options.heal_others_lr is not None and options.no_heal_others:
        raise ConfigError("--heal-others-lr", options.heal_others_lr, "has no use with --no-heal-others")
    for name in ("heal_lr", "heal_others_lr", "heal_global_batch_size"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "must be above 0")
    return iters[0], iters[1]


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
        stage, compression.config, compression.source.train_state, options, start.parent, teacher, run_dir, compression.texts.training,
        iters,
    )  # fmt: skip
    text = yaml.safe_dump(dict(config), sort_keys=False)
    if path.is_file() and path.read_text() != text:
        raise ConfigError("--heal-iters", iters, f"or another option of healing differs from {path}; give the same, or remove "
                          f"it and {run_dir}")  # fmt: skip
    path.write_text(text)
    logger.info(f"{stage.name}: megatron-samoe pretrain --config {shlex.quote(str(path))}")
    # A process of its own: the trainer keeps freed memory, and the stages before may have taken much.
    if children.run([sys.executable, "-m", "megatron_samoe", "pretrain", "--config", str(path)]).returncode != 0:
        raise MegatronSamoeError(f"{stage.name} has not ended; the same command goes on from its last checkpoint.")
    return open_checkpoint(run_dir / "checkpoints").directory


if __name__ == "__main__":
    sys.exit(main())
