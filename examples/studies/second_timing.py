#!/usr/bin/env python3
"""G7 of docs/results/registration.md: how long the study's models take to decode a token, side by side on one thread.

    python examples/studies/second_timing.py RUNS/second_regime/data OUT

Results are kept in docs/results/decode/study.json. Models are one step old, since no time follows from what is learnt; those that a
compression makes have the shapes of SaMoEs. Nothing else should run meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from second_compression import samoe
from tyro.conf import Positional

from megatron_samoe.config.cli import as_flags
from megatron_samoe.evaluation.study.definition import folder_name, read_study

HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / "docs/results/decode/study.json"
STUDIES = ("second_regime", "second_sharing", "second_combination", "second_scratch")
#: What the late cure begins from has no study.
OF_LATE = {"moe of 16": ["--num-experts", "16"]}


def main(data: Positional[Path], out: Positional[Path]) -> None:
    """Makes the models and times them.

    Args:
        data: folder of a study's datasets and tokenizer.
        out: folder of the models.
    """
    studies = [read_study(HERE / f"{name}.yaml") for name in STUDIES]
    variants = {v.name: as_flags(v.options) for study in studies for v in study.variants} | OF_LATE
    made = []
    for name, flags in variants.items():
        made.append(out / folder_name(name) / "checkpoint")
        if not made[-1].exists():
            samoe(
                *("pretrain", "--config", HERE.parent / "configs/study.yaml", *flags, "--exit-interval", 1),
                *("--no-full-validation", "--eval-iters", 0),
                *("--data-path", data / "train_text_document", "--tokenizer-type", "HuggingFaceTokenizer"),
                *("--tokenizer-model", data / "tokenizer.json", "--num-threads", 1, "--save", made[-1]),
            )
    samoe(
        *("benchmark", "decode", "--load", *made, "--servings", "folded", "on-the-fly", "--dtypes", "fp32"),
        *("--threads", 1, "--batch-sizes", 1, 8, "--prompt-lengths", 32, "--new-tokens", 96),
        *("--rounds", 15, "--json", KEPT),
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
