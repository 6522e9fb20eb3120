"""The page of a compression explains its models, compares healed ones with healed ones, and shows small losses beside large ones."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from megatron_samoe.fit.compress.judge import Verdict, losses, verdict_table
from megatron_samoe.fit.compress.report import Compressed, _hold_small_and_large, write_compression_report

ORIGINAL = Verdict("original", 1000, 5.0, 0.0)
LOST = {"matched": 0.0, "fitted": 0.02, "blind": 4.0, "pruned": 1.5, "merged": 2.0}
LEFT = {
    "healed-banks": 0.01,
    "healed-routers": -0.01,
    "original-longer": -0.06,
    "blind-healed": 0.03,
    "pruned-healed": 0.2,
}
MADE = [Verdict(name, 500, 5.0 + ce, ce) for name, ce in LOST.items()]
HEALED = [Verdict(name, 500, 5.0 + ce, 0.1) for name, ce in LEFT.items()]


class Fixed:
    """A model of a vocabulary of 5 entries, whose logits are drawn, and padded by what nobody may read."""

    vocab_size = 5

    def __init__(self, seed: int):
        self.logits_TV = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)) * 2

    def __call__(self, _ids: Tensor, _context: object) -> tuple[Tensor, None]:
        return self.logits_TV, None


def test_verdicts_are_scipys_entropies() -> None:
    """KL is of the original's predictions from the model's, not the other way round."""
    original, model = Fixed(1), Fixed(2)
    ids_BS = torch.randint(5, (3, 5), generator=torch.Generator().manual_seed(3))
    p, q = (softmax(m.logits_TV[:, :5].double().numpy(), axis=1) for m in (original, model))
    loss, divergence = losses(original, model, [ids_BS, ids_BS])  # type: ignore[arg-type]
    assert divergence == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-5)
    assert divergence != pytest.approx(entropy(q, p, axis=1).mean(), rel=0.1)
    assert loss == pytest.approx(-np.log(q[range(12), ids_BS[:, 1:].flatten()]).mean(), rel=1e-5)
    assert losses(original, original, [ids_BS])[1] == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]


def sections(path: Path, verdicts: list[Verdict]) -> dict[str, str]:
    """Returns the page's sections by name."""
    write_compression_report(path, Compressed([ORIGINAL, *verdicts], {"0": [0.1, 0.2]}, None, {}))
    parts = re.split(r'<h2 id="(\w+)">', path.read_text())[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(section: str) -> list[str]:
    return re.findall(r"<tr><td>([\w-]+)</td>", section)


def test_healed_models_are_compared_with_healed_ones(tmp_path: Path) -> None:
    page = sections(tmp_path / "page.html", [*MADE, *HEALED])
    assert rows(page["verdicts"]) == ["original", *(v.model for v in HEALED)]
    assert rows(page["made"]) == ["original", *(v.model for v in MADE)]
    assert "-0.0100 nats over the original, +0.0500 over the original trained on by as many steps" in page["verdicts"]
    assert "The fit alone: cross-entropy +0.0200" in page["made"]
    for name, group in (("verdicts", HEALED), ("made", MADE)):
        for verdict in group:
            assert f'<p class="how">{verdict.model}: ' in page[name]


def test_without_healing_there_is_one_comparison(tmp_path: Path) -> None:
    page = sections(tmp_path / "page.html", MADE)
    assert rows(page["verdicts"]) == ["original", *(v.model for v in MADE)] and "made" not in page
    assert "not healed" in page["verdicts"]
    assert verdict_table([ORIGINAL, *MADE])[3] == ["fitted", "500", "0.500", "5.0200", "+0.0200", "0.0200"]


@pytest.mark.parametrize("largest", [4.0, 100.0])
def test_one_large_loss_does_not_flatten_small_ones(largest: float) -> None:
    figure, axes = plt.subplots()
    axes.plot([0.0, 0.02, 0.06, largest], [0, 1, 2, 3])
    _hold_small_and_large(axes.set_xscale, axes.xaxis)
    places = [axes.transAxes.inverted().transform(axes.transData.transform((x, 0.0)))[0] for x in (0.0, 0.02, 0.06)]
    plt.close(figure)
    assert places[1] - places[0] > 0.15 and places[2] - places[1] > 0.05
