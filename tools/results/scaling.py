"""G6: whether the order of models is the same at other widths and lengths."""

from __future__ import annotations

import itertools
import math

from tools.results.verdicts import FEW, HeldOut, short, table_of

#: How the table begins.
HEAD = (
    "| test loss, seed 1 | dense (D) | MoE of 8 (M) | SaMoE of 2 banks of 32 (S) | S - M | of the MoE's gain it keeps |"
)
_MODELS = ("second_regime/dense", FEW, "second_combination/2 banks of 32")
_AS_OTHERS = "width 64, 9.8 M tokens"
_SIZES = ("width 48", _AS_OTHERS, "width 96", "4.9 M tokens", "19.7 M tokens")


def scaling(held_out: HeldOut) -> tuple[str, dict[str, float]]:
    """Returns the table of losses by size, and what 480 steps beyond 4,800 are worth to the MoE of 8 if its loss is linear in the logarithm
    of tokens, nats: `480 steps, from 4.9 M tokens` by the slope from half of the tokens on, `480 steps, to 19.7 M tokens` by that to twice.

    Both are empty before all runs of the study `second_scaling` are there.
    """
    names = {
        (size, model): model if size == _AS_OTHERS else f"second_scaling/{short(model)}, {size}"
        for size in _SIZES
        for model in _MODELS
    }
    if not held_out.whole.issuperset(names.values()):
        return "", {}
    losses = {place: held_out.trained[name][1] for place, name in names.items()}
    rows = list[list[str]]()
    for size in _SIZES:
        dense, own, shared = (losses[size, model] for model in _MODELS)
        kept = (dense - shared) / (dense - own)
        rows.append([size, f"{dense:.4f}", f"{own:.4f}", f"{shared:.4f}", f"{shared - own:+.4f}", f"{kept:.2f}"])
    by_tokens = [losses[size, FEW] for size in ("4.9 M tokens", _AS_OTHERS, "19.7 M tokens")]
    before, after = (math.log2(5280 / 4800) * (a - b) for a, b in itertools.pairwise(by_tokens))
    return table_of(HEAD, rows), {"480 steps, from 4.9 M tokens": before, "480 steps, to 19.7 M tokens": after}
