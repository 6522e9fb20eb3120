#!/usr/bin/env python3
"""G5 of docs/results/registration.md: each MoE of 32 of `second_regime`, compressed to a half and to a quarter of its expert bytes.

    python examples/studies/second_compression.py RUNS/second_regime OUT        # or beside each other, with --seeds
    python examples/studies/second_compression.py RUNS/second_regime OUT --all-weights        # E5 of the third edition

Results are in OUT, and what is kept of them in docs/results/compression: one file for each seed and budget with every model's loss on
validation text, its divergence from the original there, and its loss on the test split, computed as the study's runs do. The
same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from megatron_samoe import children

KEPT = Path(__file__).resolve().parents[2] / "docs/results/compression"
BUDGETS = {"half": 0.5, "quarter": 0.25}
#: Models whose loss on the test split is computed, with the folders that a compression leaves them in.
TESTED = ("original", "fitted", "blind-healed", "pruned-healed", "original-longer")
#: Options of healing and the folder of what they heal: by banks and routers at the original's peak rate, and, for E5 of the third
#: edition, by all weights at a third of it.
BY_STAGES = ("--heal-iters", 160, 320), "healed-routers"
ALL_WEIGHTS = ("--heal-iters", 0, 0, 480, "--heal-lr", 1e-3), "healed-all"


def samoe(*words: object) -> None:
    """Runs a command of the package."""
    children.run([sys.executable, "-m", "megatron_samoe", *map(str, words)], check=True)


def test_loss(run: Path, model: Path, data: Path) -> float:
    """Returns a model's loss on the test split."""
    if not (run / "metrics.jsonl").is_file():
        samoe(
            *("pretrain", "--load", model, "--use-checkpoint-args", "--skip-train", "--full-validation"),
            *("--micro-batch-size", 16, "--num-threads", 1, "--test-data-path", data, "--run-dir", run),
        )
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"])


def compress(original: Path, out: Path, data: Path, budget: float, all_weights: bool) -> dict[str, dict[str, float]]:
    """Returns what is kept of each model of a compression."""
    heal, healed = ALL_WEIGHTS if all_weights else BY_STAGES
    samoe(
        *("compress", "--load-dir", original, "--save-dir", out, "--budget", budget, *heal),
        *("--data-path", data / "train_text_document", "--calibration-tokens", 524288),
        *("--valid-data-path", data / "valid_text_document", "--judge-tokens", 524288),
    )
    models = {v.pop("model"): v for v in json.loads((out / "verdicts.json").read_text())["verdicts"]}
    for name in (*TESTED, healed):
        folder = original if name == "original" else out / name
        models[name]["test_loss"] = test_loss(out / f"test-{name}", folder, data / "test_text_document")
    return models


def main(
    runs: Positional[Path], out: Positional[Path], seeds: tuple[int, ...] = (1, 2, 3), all_weights: bool = False
) -> None:
    """Compresses all models of some seeds.

    Args:
        runs: folder of second_regime's runs.
        out: folder of the compressions.
        all_weights: heal all weights at once, for E5.
    """
    kind = "whole_" if all_weights else ""
    for seed in seeds:
        # Seed 1 is the sweep's run at the rate that was chosen.
        places = [runs / "moe-of-32" / name for name in (f"seed-{seed}", f"lr-0.003/seed-{seed}")]
        original = next((place for place in places if (place / "checkpoints").is_dir()), None)
        if original is None:
            raise SystemExit(
                f"error: no checkpoints in {places[0]} or {places[1]}: make examples/studies/second_regime.yaml first"
            )
        for name, budget in BUDGETS.items():
            models = compress(original, out / f"seed-{seed}-{kind}{name}", runs / "data", budget, all_weights)
            KEPT.mkdir(exist_ok=True)
            (KEPT / f"seed-{seed}-{kind}{name}.json").write_text(json.dumps(models, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
