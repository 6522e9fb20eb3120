"""Shows what a checkpoint's experts are taught: `megatron-samoe diagnose --load runs/samoe --batches 16 --output diagnosis.png`.

Over batches that the run would have seen next: what the loss would be without a layer's experts, size and alignment of
gradients of each layer's experts and of each bank, how alike layers' gradients are, and how often layers send a token to experts
of the same number. Words that it does not know are
flags of pretraining that name other data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_samoe.cli.arguments import Words, adder, program, text_parser
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.plots_diagnosis import diagnosis_plot
from megatron_samoe.evaluation.run_summary import Table, format_table
from megatron_samoe.training.expert_diagnosis import Diagnosis, diagnose


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    add = adder(parser)
    add("--load", str, "folder of a run or of checkpoints", required=True, metavar="DIR")
    add("--ckpt-step", [int], "iterations to look at, in place of the newest", metavar="N")
    add("--batches", int, "global batches of training data", default=8, metavar="N")
    add("--json", Path, "all numbers, a list with an entry for each checkpoint", metavar="FILE")
    add("--output", Path, "a picture of the last checkpoint, as PNG", metavar="FILE")
    return parser


@program
def main(words: Words) -> None:
    """Runs the command."""
    options, flags = make_parser().parse_known_args(words)
    if options.batches < 2:
        raise ConfigError("--batches", options.batches, "must be at least 2: alignment is between batches")
    data = parse_pretrain_args(flags, prog="megatron-samoe diagnose").data if flags else None
    found = [diagnose(options.load, options.batches, data, step) for step in options.ckpt_step or [None]]
    for diagnosis in found:
        print(f"\niteration {diagnosis.iteration}, {diagnosis.batches} batches, loss {diagnosis.loss:.4f}\n")
        print(format_table(_table(diagnosis)))
        print(_words(diagnosis))
    if options.json is not None:
        options.json.write_text(json.dumps([diagnosis.to_json() for diagnosis in found]) + "\n")
    if options.output is not None:
        options.output.write_bytes(diagnosis_plot(found[-1].to_json()))


def _table(diagnosis: Diagnosis) -> Table:
    rows = [["experts of", "loss without", "gradient RMS", "least", "most", "alignment", "least", "most"]]
    views = [("layer", diagnosis.layers), *([("bank", diagnosis.banks)] if diagnosis.banks is not None else [])]
    for what, view in views:
        for number, (rms_E, alignment_E) in enumerate(zip(view.rms_NE, view.alignment_NE, strict=True)):
            numbers = [f"{x:.2e}" for x in (rms_E.mean(), rms_E.min(), rms_E.max())]
            worth = f"{diagnosis.worth_L[number]:+.4f}" if what == "layer" else ""
            rows.append(
                [f"{what} {number}", worth, *numbers, *(f"{f(alignment_E):.3f}" for f in (np.mean, np.min, np.max))]
            )
    return rows


def _words(diagnosis: Diagnosis) -> str:
    def apart(matrix_LL: np.ndarray) -> float:
        off = ~np.eye(len(matrix_LL), dtype=bool)
        return float(matrix_LL[off].mean()) if off.any() else float("nan")

    return (
        f"alignment of unrelated batches would be {1 / diagnosis.batches:.3f}; cosine between layers' gradients of experts of "
        f"one number {apart(diagnosis.similarity_LL):+.3f};\nchoices that two layers have in common "
        f"{apart(diagnosis.overlap_LL):.3f}, by their loads alone {apart(diagnosis.chance_LL):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
