#!/usr/bin/env python3
"""G7 of docs/results/registration.md: how long the study's models take to decode a token, side by side on one thread.

    python examples/studies/second_timing.py RUNS/second_regime/data OUT

Results are kept in docs/results/decode/study.json. Models are one step old, since no time follows from what is learnt; those that a
compression makes have the shapes of SaMoEs. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from second_compression import samoe

from megatron_samoe.evaluation.study.definition import folder_name, read_study

HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / "docs/results/decode/study.json"
STUDIES = ("second_regime", "second_sharing", "second_combination", "second_scratch")
#: What the late cure begins from has no study.
OF_LATE = {"moe of 16": ("--num-experts", "16")}


def main(data: Path, out: Path) -> None:
    """Makes the models and times them."""
    variants = {v.name: v.flags for name in STUDIES for v in read_study(HERE / f"{name}.yaml").variants} | OF_LATE
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a study's datasets and tokenizer")
    parser.add_argument("out", type=Path, help="folder of the models")
    args = parser.parse_args()
    main(args.data, args.out)
