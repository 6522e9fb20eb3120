"""Registered claims are judged by pairs, with one spread, and only once all of their runs are there."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pandas
import pytest
import statsmodels.formula.api as smf
from PIL import Image
from scipy import stats

from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.statistics import common_spread, own_half_width
from tests.unit.tools_results.made_runs import run_of
from tools.results.page_figures import with_table
from tools.results.result_plots import Plot
from tools.results.scaling import scaling
from tools.results.verdicts import (
    MANY,
    Claim,
    HeldOut,
    Losses,
    compressed_losses,
    foreign_originals,
    judge,
    losses_on_test,
    verdict_table,
)

SMALL, LARGE = (
    Claim("G9", tuple((f"second_s/{name}", "second_s/moe") for name in ("good", "same", "lost")), *test)
    for test in (("below",), ("within", 0.03))
)


def held_out(trained: Losses, claim: Claim, derived: Losses | None = None, **more: object) -> HeldOut:
    """Returns what is known of the test split where all runs are there."""
    found = HeldOut(trained, derived or {}, frozenset([*trained, *(derived or {})]), claims=[claim])
    return replace(found, **more)  # type: ignore[arg-type]


def test_claims_are_judged_with_one_spread_and_a_model_that_was_given_up_is_not_better() -> None:
    losses = {
        "second_s/moe": [3.50, 3.52, 3.51],
        "second_s/good": [3.40, 3.425, 3.41],
        "second_s/same": [3.497, 3.519, 3.509],
        "second_s/lost": [3.60],
    }
    by_model = {name: dict(enumerate(row)) for name, row in losses.items()}
    rows = [(n, s, x) for n, row in losses.items() for s, x in enumerate(row)]
    fit = smf.ols("y ~ C(m, Treatment('second_s/moe')) + C(s)", pandas.DataFrame(rows, columns=["m", "s", "y"])).fit()
    t_of = {name: fit.tvalues[f"C(m, Treatment('second_s/moe'))[T.second_s/{name}]"] for name in ("good", "same")}
    given_up = frozenset(["second_s/lost"])
    good, same, lost = judge(held_out(by_model, SMALL, given_up=given_up))
    assert good.p == pytest.approx(3 * stats.t.cdf(t_of["good"], fit.df_resid)) and good.is_supported
    assert same.p == pytest.approx(2 * stats.t.cdf(t_of["same"], fit.df_resid)) and not same.is_supported
    assert (len(lost.differences), lost.p, lost.is_supported) == (1, 1.0, False)
    bse = fit.bse["C(m, Treatment('second_s/moe'))[T.second_s/good]"]
    assert good.half_width == pytest.approx(stats.t.ppf(0.975, fit.df_resid) * bse)
    assert [v.is_supported for v in judge(held_out(by_model, LARGE, given_up=given_up))] == [False, True, False]
    page = f"Text.\n\n{verdict_table([good, same, lost])}\nMore.\n"
    assert "| G9 | lost | moe | 1 | +0.1000 ± " in page
    assert with_table(page.replace("| G9 | same", "| G9 | other"), verdict_table([good, same, lost])) == page


def test_a_loss_on_the_test_split_is_not_looked_at_before_all_of_a_claim_is_there() -> None:
    trained = {f"second_s/{name}": {1: 3.5, 2: 3.6} for name in ("moe", "good", "same", "lost")}
    found = held_out(trained, SMALL, whole=frozenset(trained) - {"second_s/same"})
    assert found.opened == {} and not list(judge(found)) and scaling(found) == ("", {})
    both = replace(found, claims=[SMALL, Claim("G8", (("second_s/good", "second_s/moe"),), "below")])
    assert list(both.opened) == ["second_s/moe", "second_s/good"] and len(list(judge(both))) == 1
    waiting = replace(both, claims=[replace(claim, waits_for=("second_s/same",)) for claim in both.claims])
    assert waiting.opened == {}, "an experiment's models are looked at together"


@pytest.mark.parametrize("is_whole", [False, True])
def test_further_seeds_of_a_baseline_count_once_all_of_their_experiment_is_there(is_whole: bool) -> None:
    def plan_of(*names: str) -> StudyPlan:
        variants = [SimpleNamespace(name=name) for name in names]
        runs = [SimpleNamespace(variant=variant) for variant in variants]
        plan = SimpleNamespace(study=SimpleNamespace(variants=variants), given_up=list, all_runs=lambda: runs)
        plan.is_finished = lambda run: is_whole or "UniPool" not in run.variant.name
        return cast(StudyPlan, plan)

    studies = {"second_regime": "moe of 8", "third_own": "moe of 8", "third_lock": "pool, locked, softmax"}
    studies |= {"third_norm": "moe of 8, norm", "third_unipool": "pool, locked as UniPool"}
    studies["second_sharing"] = "pool, locked"
    models = {f"{study}/{name}": {1: run_of(3.5)} for study, name in studies.items()}
    models["third_own/moe of 8"] = {4: run_of(3.6)}
    models["third_lock/pool, locked, softmax"] = {1: run_of(3.4), 4: run_of(3.4)}
    found = losses_on_test({study: plan_of(name) for study, name in studies.items()}, models, {})
    assert found.trained["second_regime/moe of 8"] == ({1: 4.5, 4: 4.6} if is_whole else {1: 4.5})
    lock = [v for v in judge(found) if v.claim.name == "E1, free"]
    assert [list(v.differences) for v in lock] == ([pytest.approx([-0.1, -0.2])] if is_whole else [])


def test_a_spread_of_its_own_decides_an_interval_too() -> None:
    losses = {
        "second_s/moe": {1: 3.5, 2: 3.6, 3: 3.7},
        "second_s/same": {1: 3.501, 2: 3.599, 3: 3.7},
        "second_s/good": {1: 3.4, 2: 3.7, 3: 3.6},
        **{f"second_s/{n}": {1: 3.5 + n / 100, 2: 3.6 + n / 100, 3: 3.7 + n / 100} for n in range(40)},
    }
    claim = Claim("G9", tuple((name, "second_s/moe") for name in losses if name != "second_s/moe"), "below")
    verdict = next(v for v in judge(held_out(losses, claim)) if v.model == "second_s/good")
    assert verdict.half_width == pytest.approx(own_half_width(verdict.differences))


def test_models_that_were_compressed_are_judged_by_the_spread_of_trained_ones(tmp_path: Path) -> None:
    trained = {"second_s/a": {1: 3.5, 2: 3.6, 3: 3.7}, "second_s/b": {1: 3.401, 2: 3.499, 3: 3.6}}
    for seed in (1, 2, 3):
        kept = {
            name: {"test_loss": 3.0 + seed / 10 + more}
            for name, more in (("healed", 0.015), ("original-longer", 0.0), ("original", 0.005))
        }
        (tmp_path / f"seed-{seed}-half.json").write_text(json.dumps(kept | {"matched": {"loss": 3.0}}))
    derived = compressed_losses(tmp_path)
    assert sorted(derived) == ["half/healed", "half/original", "half/original-longer"]
    pairs = (("half/healed", "second_s/a"), ("half/original-longer", "second_s/b"))
    found = held_out(trained, Claim("G5", pairs, "below", -0.3), derived)
    less, equal = judge(found)
    assert less.cells[1:4] == ["half healed", "a", "3"]
    assert less.mean == pytest.approx(-0.385) and less.is_supported
    assert equal.mean == pytest.approx(-0.3) and equal.p == pytest.approx(0.5)
    spread = common_spread({name: list(row.values()) for name, row in trained.items()})
    assert less.half_width == pytest.approx(spread.half_width(less.differences))


def test_an_original_that_the_store_does_not_have_is_named() -> None:
    trained, derived = {MANY: {1: 3.5, 2: 3.6}}, {"half/original": {1: 3.5, 2: 3.61}, "quarter/original": {1: 3.5}}
    [said] = foreign_originals(held_out(trained, SMALL, derived))
    assert "the original of half, seed 2" in said


def test_a_plot_is_kept_with_what_it_shows(tmp_path: Path) -> None:
    def drawn(_: object) -> bytes:
        Image.new("L", (1, 1)).save(box := BytesIO(), "png")
        return box.getvalue()

    path, plot = tmp_path / "plot.png", Plot({"dense": 3.7}, drawn)
    assert not plot.is_in(path)
    plot.write(path)
    assert plot.is_in(path) and not replace(plot, shown={"dense": 3.8}).is_in(path)
