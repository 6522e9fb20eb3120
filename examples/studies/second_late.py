#!/usr/bin/env python3
"""A cure of G1 in docs/results/registration.md: sharing that begins late.

    python examples/studies/second_late.py DATA OUT        # DATA: the folder `data` of second_sharing's runs

A MoE of 16 trains to where the rate begins to fall. Then `compress` lets its layers combine 4 banks of 16, half of the parameters,
and all weights go on with the steps that are left. Beside it: the same MoE with its half of the least saliency pruned, and
unchanged. Losses are kept in docs/results/compression. The same command goes on where it was stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

import tyro
from second_compression import KEPT, samoe
from tyro.conf import Positional

CONFIG = Path(__file__).resolve().parents[1] / "configs/study.yaml"
#: Where 4,800 steps have 960 left, in which the rate falls.
SHARING_BEGINS = 3840


def train(run: Path, data: Path, seed: int, *words: object) -> dict[str, float]:
    """Trains as the study does, if that is not done, and returns the last record's losses."""
    metrics = run / "metrics.jsonl"
    if not (metrics.is_file() and '"test_loss"' in metrics.read_text()):
        samoe(
            *("pretrain", "--config", CONFIG, "--num-threads", 1, "--optimizer", "muon", "--lr", 3e-3, "--seed", seed),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", data / "tokenizer.json"),
            *(w for s in ("train", "valid", "test") for w in (f"--{s}-data-path", data / f"{s}_text_document")),
            *("--run-dir", run, "--save-interval", SHARING_BEGINS // 8, *words),
        )
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {name: last[name] for name in ("validation_loss", "test_loss") if name in last}


def late(data: Path, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Returns the losses of each model of a seed."""
    early, half = out / "early", out / "half"
    if not (early / f"checkpoints/iter_{SHARING_BEGINS:07d}").is_dir():
        train(early, data, seed, "--num-experts", 16, "--exit-interval", SHARING_BEGINS)
    samoe(
        *("compress", "--load-dir", early, "--save-dir", half, "--budget", 0.5, "--calibration-tokens", 524288),
        *("--data-path", data / "train_text_document", "--valid-data-path", data / "valid_text_document"),
    )
    begins = {
        "moe-of-16": (early, "--num-experts", 16),
        "4-banks-of-16": (half / "fitted", "--use-checkpoint-args", "--no-load-optim"),
        "pruned-to-8": (half / "pruned", "--use-checkpoint-args", "--no-load-optim"),
    }
    return {name: train(out / name, data, seed, "--load", *words) for name, words in begins.items()}


def main(data: Positional[Path], out: Positional[Path], seeds: tuple[int, ...] = (1, 2, 3)) -> None:
    """Trains all models of some seeds.

    Args:
        data: folder of the study's data.
        out: folder of the runs.
    """
    for seed in seeds:
        losses = late(data, out / f"seed-{seed}", seed)
        (KEPT / f"seed-{seed}-late.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
