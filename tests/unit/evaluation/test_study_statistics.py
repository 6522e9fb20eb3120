"""Statistics of studies: intervals against their definition, error rates by simulation, sweeps, scaling fits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas
import pytest
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.multitest import multipletests

from megatron_samoe.evaluation.study.statistics import (
    ScalingPoint,
    common_spread,
    differences,
    fit_scaling,
    holm,
    p_equivalent,
    seeds_needed,
)
from megatron_samoe.evaluation.study.sweeps import extended, optimum
from tests.harness.tables import table

TABLE = table(__file__)


def test_differences_are_taken_within_seeds() -> None:
    # Seeds differ by 1, the models by about 0.1 in each: the spread over seeds must not hide it.
    found = differences({"a": [5.1, 6.12, 7.08], "b": [5.0, 6.0, 7.0]}, "b", 0.02)["a"]
    assert found.mean == pytest.approx(0.1)
    assert found.half_width == pytest.approx(4.303 * 0.02 / math.sqrt(3), rel=1e-3)
    assert found.p_equivalent > 0.9
    assert math.isnan(differences({"a": [1.0], "b": [2.0]}, "b", 0.02)["a"].half_width)


@pytest.mark.night
def test_equivalence_is_claimed_rarely_at_the_margin_and_as_often_as_the_power_within() -> None:
    rng = np.random.default_rng(2)
    spread, margin, draws = 0.015, 0.02, 2000
    count = seeds_needed(spread, margin)
    at_margin = sum(p_equivalent(rng.normal(margin, spread, count), margin) < 0.05 for _ in range(draws))
    within = sum(p_equivalent(rng.normal(0, spread, count), margin) < 0.05 for _ in range(draws))
    assert at_margin / draws < 0.065
    assert within / draws == pytest.approx(0.8, abs=0.12) and within / draws > 0.77
    assert seeds_needed(spread, margin, 0.95) > count > seeds_needed(spread / 3, margin)


def test_equal_values_are_equivalent() -> None:
    assert p_equivalent([0.0, 0.0, 0.0], 0.02) == 0.0 and p_equivalent([0.03, 0.03], 0.02) == 1.0
    values = [0.001, -0.002, 0.004]
    t = (np.mean(values) - 0.02) / (np.std(values, ddof=1) / math.sqrt(3))
    assert p_equivalent(values, 0.02) == pytest.approx(stats.t.cdf(t, 2))


def test_a_sweep_finds_the_vertex_between_what_was_tried() -> None:
    losses = {rate: 4 + (math.log(rate / 4e-3)) ** 2 / 10 for rate in (1.5e-3, 3e-3, 6e-3, 12e-3)}
    found = optimum(losses)
    assert found.edge is None and found.value == pytest.approx(4e-3) and found.loss == pytest.approx(4)
    assert optimum(losses, between=False).value == 3e-3


@pytest.mark.parametrize(("losses", "value", "edge"), TABLE["edges"])
def test_a_sweep_says_where_the_best_lies_at_an_edge(
    losses: dict[float, float], value: float, edge: str | None
) -> None:
    found = optimum(losses)
    assert (found.value, found.edge) == (value, edge)


def test_a_range_grows_in_its_own_ratio() -> None:
    assert extended([1.0, 2.0, 4.0], "high") == 8.0 and extended([1.0, 2.0, 4.0], "low") == 0.5


def test_a_scaling_fit_finds_what_made_the_losses() -> None:
    rng = np.random.default_rng(0)

    def loss(active: float, total: float, tokens: float) -> float:
        return 1.6 + 1.2 * (active / 1e6) ** -0.25 * (total / active) ** -0.08 + 1.5 * (tokens / 1e6) ** -0.5

    points = []
    for active in (0.5e6, 1e6, 2e6, 4e6):
        for tokens in (1e6, 3e6, 6e6):
            for model, expert, worth in (("", 0.0, 1.0), ("", 16 * active, 1.0), ("samoe", 4 * active, 2.0)):
                measured = loss(active, active + worth * expert, tokens) + rng.normal(0, 0.001)
                points.append(ScalingPoint(model, active, expert, tokens, measured))
    fit = fit_scaling(points, draws=8)
    assert fit.error < 0.002
    assert fit.low["samoe"] < 2.0 < fit.high["samoe"] and abs(fit.values["samoe"] - 2) < 0.5
    larger = ScalingPoint("samoe", 8e6, 32e6, 6e6, math.nan)
    assert fit.predict(larger) == pytest.approx(loss(8e6, 8e6 + 2 * 32e6, 6e6), abs=0.02)
    with pytest.raises(ValueError, match="cannot determine"):
        fit_scaling(points[:5])


def scattered(models: str, seeds: int, sd: float, seed: int) -> dict[str, list[float]]:
    """Returns losses of models that differ by 0.02 each, over seeds that differ by much more."""
    rng = np.random.default_rng(seed)
    parts = rng.normal(0, 0.5, seeds)
    return {m: list(3 + 0.02 * k + parts + rng.normal(0, sd, seeds)) for k, m in enumerate(models)}


def linear_model(losses: dict[str, list[float]]) -> Any:
    """Returns statsmodels' fit of a level for each model and each seed."""
    rows = [(m, str(s), loss) for m, row in losses.items() for s, loss in enumerate(row) if loss == loss]
    return smf.ols("loss ~ C(model) + C(seed)", pandas.DataFrame(rows, columns=["model", "seed", "loss"])).fit()


def test_the_common_spread_is_that_of_a_linear_model_of_models_and_seeds() -> None:
    losses = scattered("abcd", 4, 0.01, 0)
    losses["d"][2:] = [math.nan, math.nan]
    fit, found = linear_model(losses), common_spread(losses)
    assert (found.sd, found.freedom) == (pytest.approx(math.sqrt(fit.mse_resid)), fit.df_resid)


@pytest.mark.parametrize("models", ["ab", "abcd"])
def test_differences_are_those_of_a_linear_model_of_models_and_seeds(models: str) -> None:
    """Seeds scatter a hundred times as widely as models within one."""
    losses = scattered(models, 4, 0.01, 3)
    fit, found = linear_model(losses), differences(losses, "a", 0.02)
    others = {name: f"C(model)[T.{name}]" for name in models[1:]}
    corrected = multipletests([fit.pvalues[row] for row in others.values()], method="holm")[1]
    for (name, row), p_holm in zip(others.items(), corrected, strict=True):
        half_width = fit.params[row] - fit.conf_int().loc[row, 0]
        assert (found[name].mean, found[name].pooled_half_width) == pytest.approx((fit.params[row], half_width))
        assert found[name].p_holm == pytest.approx(p_holm)


def test_holms_correction_is_that_of_statsmodels() -> None:
    values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": 0.9}
    expected = multipletests(list(values.values()), method="holm")[1]
    assert holm({**values, "unknown": math.nan}) == pytest.approx(
        dict(zip(values, expected, strict=True)) | {"unknown": math.nan}, nan_ok=True
    )


def test_a_model_made_of_another_says_nothing_of_the_spread_of_trained_ones() -> None:
    losses = scattered("abc", 3, 0.005, 1)
    alone = differences(losses, "a", 0.02)["b"]
    losses["made of b"] = [losses["b"][0] + 0.1, losses["b"][1] + 0.5, losses["b"][2] - 0.2]
    assert differences(losses, "a", 0.02, ["made of b"])["b"].pooled_half_width == pytest.approx(
        alone.pooled_half_width
    )
    assert differences(losses, "a", 0.02)["b"].pooled_half_width > 10 * alone.pooled_half_width
    made = differences(losses, "a", 0.02, ["made of b"])["made of b"]
    own = np.array(losses["made of b"]) - losses["a"]
    assert made.p_holm == pytest.approx(stats.ttest_1samp(own, 0).pvalue), "its own spread decides, being so much wider"


def test_a_model_of_one_seed_has_an_interval_from_the_others_spread() -> None:
    losses = scattered("abc", 3, 0.005, 2)
    losses["c"][1:] = [math.nan, math.nan]
    found = differences(losses, "a", 0.02)["c"]
    assert found.mean == pytest.approx(losses["c"][0] - losses["a"][0])
    assert math.isnan(found.half_width) and 0 < found.pooled_half_width < 0.2 and found.p_holm < 1
