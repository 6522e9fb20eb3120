"""G6: whether the order of models is the same at other widths and lengths, and a law fitted to all but one of their losses."""

from __future__ import annotations

from megatron_samoe.evaluation.study.statistics import ScalingPoint, fit_scaling
from tools.results.page_figures import Models
from tools.results.verdicts import FEW, HeldOut, short, table_of

#: How the table begins.
HEAD = "| test loss, seed 1 | dense (D) | MoE of 8 (M) | SaMoE of 2 banks of 32 (S) | order | S - M |"
_MODELS = ("second_regime/dense", FEW, "second_combination/2 banks of 32")
_AS_OTHERS, _SHORT = "width 64, 9.8 M tokens", ("D", "M", "S")
_SIZES = ("width 48", _AS_OTHERS, "width 96", "4.9 M tokens", "19.7 M tokens")
#: Size and model that the fit does not see.
_LEFT_OUT = ("width 96", _MODELS[2])


def scaling(models: Models, held_out: HeldOut) -> tuple[str, dict[str, float]]:
    """Returns the table of losses by size, and by name what the fit misses: `fit` of what it saw, `fit held out` of what it did not, nats.

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
    rows, points = list[list[str]](), dict[tuple[str, str], ScalingPoint]()
    for size in _SIZES:
        row = [losses[size, model] for model in _MODELS]
        order = " < ".join(letter for _, letter in sorted(zip(row, _SHORT, strict=True)))
        rows.append([size, *(f"{loss:.4f}" for loss in row), order, f"{row[2] - row[1]:+.4f}"])
    for (size, model), loss in losses.items():
        run = models[names[size, model]][1]
        kind, tokens = "samoe" if run.config.moe.has_pool else "", float(run.num_tokens or 0)
        # A token's experts count once: in what it meets.
        beyond = run.parameters.total - run.parameters.active
        points[size, model] = ScalingPoint(kind, run.parameters.active, beyond, tokens, loss)
    left_out = points.pop(_LEFT_OUT)
    fit = fit_scaling(list(points.values()), draws=0)
    return table_of(HEAD, rows), {"fit": fit.error, "fit held out": fit.predict(left_out) - left_out.loss}
