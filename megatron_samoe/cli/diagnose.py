"""Shows what the experts of a checkpoint are taught."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from megatron_samoe.cli.program import HandsOn, program
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.plots_diagnosis import diagnosis_plot
from megatron_samoe.evaluation.run_summary import Table, format_table
from megatron_samoe.training.expert_diagnosis import RANKS, Diagnosis, diagnose


@dataclass(frozen=True, kw_only=True)
class Diagnose(HandsOn):
    """Shows what a checkpoint's experts are taught.

    Over batches that the run would have seen next: what the loss would be without a layer's experts, size and alignment of
    gradients of each layer's experts and of each bank, how similar layers' gradients are, of which rank, and how often layers send
    a token to experts of the same number; nothing of gradients where layers share experts otherwise than by banks. Words that
    it does not know are flags of pretraining that name other data.
    """

    load: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """folder of a run or of checkpoints"""
    ckpt_step: tuple[int, ...] = ()
    """iterations to look at; the newest if not given"""
    batches: int = 8
    """global batches of training data"""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """all numbers, a list with an entry for each checkpoint"""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """a picture of the last checkpoint, as PNG"""

    def run(self) -> None:
        if self.batches < 2:
            raise ConfigError("--batches", self.batches, "must be at least 2: alignment is between batches")
        data = parse_pretrain_args(self.others, prog="megatron-samoe diagnose").data if self.others else None
        found = [diagnose(self.load, self.batches, data, step) for step in self.ckpt_step or [None]]
        for diagnosis in found:
            print(f"\niteration {diagnosis.iteration}, {diagnosis.batches} batches, loss {diagnosis.loss:.4f}\n")
            print(format_table(_table(diagnosis)))
            print(_words(diagnosis))
        if self.json is not None:
            self.json.write_text(json.dumps([diagnosis.to_json() for diagnosis in found]) + "\n")
        if self.output is not None:
            self.output.write_bytes(diagnosis_plot(found[-1].to_json()))


def _table(diagnosis: Diagnosis) -> Table:
    worth_L = [f"{worth:+.4f}" for worth in diagnosis.worth_L]
    if diagnosis.layers is None:
        return [["experts of", "loss without"], *([f"layer {n}", worth] for n, worth in enumerate(worth_L))]
    rows = [["experts of", "loss without", "gradient RMS", "least", "most", "alignment", "least", "most"]]
    views = [("layer", diagnosis.layers), *([("bank", diagnosis.banks)] if diagnosis.banks is not None else [])]
    for what, view in views:
        for number, (rms_E, alignment_E) in enumerate(zip(view.rms_NE, view.alignment_NE, strict=True)):
            numbers = [f"{x:.2e}" for x in (rms_E.mean(), rms_E.min(), rms_E.max())]
            worth = worth_L[number] if what == "layer" else ""
            rows.append(
                [f"{what} {number}", worth, *numbers, *(f"{f(alignment_E):.3f}" for f in (np.mean, np.min, np.max))]
            )
    return rows


def _words(diagnosis: Diagnosis) -> str:
    def apart(matrix_LL: np.ndarray) -> float:
        off = ~np.eye(len(matrix_LL), dtype=bool)
        known = matrix_LL[off & ~np.isnan(matrix_LL)]
        return float(known.mean()) if len(known) else float("nan")

    choices = (
        f"choices that two layers have in common {apart(diagnosis.overlap_LL):.3f}, by their loads only "
        f"{apart(diagnosis.chance_LL):.3f}; a token visits {diagnosis.choices_L.min():.2f} to {diagnosis.choices_L.max():.2f} experts"
    )
    if diagnosis.similarity_LL is None or diagnosis.rank_shares_LR is None:
        return f"{choices};\nlayers have no gradients to compare: they share experts, or differ in their number"
    known_LR = diagnosis.rank_shares_LR[~np.isnan(diagnosis.rank_shares_LR[:, 0])]
    shares_R = known_LR.mean(0) if len(known_LR) else diagnosis.rank_shares_LR[0]
    return (
        f"alignment of unrelated batches would be {1 / diagnosis.batches:.3f}; cosine between what layers want of experts of "
        f"one number {apart(diagnosis.similarity_LL):+.3f};\n{choices};\nmatrices of rank "
        f"{', '.join(map(str, RANKS))} hold {', '.join(f'{share:.2f}' for share in shares_R)} of what layers want"
    )


main = program(Diagnose)

if __name__ == "__main__":
    sys.exit(main())
