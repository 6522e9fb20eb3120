"""The picture of a compression: what layers and pairs of layers lose, and how far each model is from the original."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_samoe.compress.judge import Verdict
from megatron_samoe.evaluation.plots import colour, grid, png_of, side_by_side
from megatron_samoe.parsing import JsonObject


def compression_plot(verdicts: Sequence[Verdict], lost: JsonObject, pairs: Sequence[Sequence[float]] | None) -> bytes:
    """Returns a picture as PNG.

    Args:
        verdicts: the original's first.
        lost: by MoE layer, what w1 and w2 lose.
        pairs: error_LL of pairs of layers; None where no map was chosen.
    """
    figure, panels = side_by_side(3 if pairs is None else 4, width=6.0)
    others = verdicts[1:]
    names, at = [v.model for v in others], np.arange(len(others))
    gaps = [v.loss - verdicts[0].loss for v in others]
    for axes, values, title in ((panels[0], gaps, "CE over the original (nats)"),
                                (panels[1], [v.divergence for v in others], "KL from the original (nats)")):  # fmt: skip
        axes.barh(at, values, color=[colour(n) for n in range(len(others))])
        axes.set_yticks(at, names)
        axes.invert_yaxis()
        axes.set(title=title)
    layers = sorted(lost, key=int)
    for row, name in enumerate(("w1", "w2")):
        panels[2].plot(
            [int(layer) for layer in layers],
            [lost[layer][row] for layer in layers],
            "o-",
            label=name,
            color=colour(row),
        )
    panels[2].set(title="lost of a layer's products (norm / norm)", xlabel="MoE layer", ylim=(0, None))
    panels[2].legend()
    for axes in panels[:3]:
        axes.grid(alpha=0.3)
    if pairs is not None:
        figure.colorbar(grid(panels[3], np.array(pairs), cmap="viridis"), ax=panels[3])
        panels[3].set(title="share of products that a pair loses", xlabel="MoE layer", ylabel="MoE layer")
    return png_of(figure)
