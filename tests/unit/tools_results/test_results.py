"""Results that check themselves: registered claims are judged by pairs, with one spread, once all of their runs are there; a page's
figures are compared with runs, and a store's runs with their keys and their registration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas
import pytest
import statsmodels.formula.api as smf
from PIL import Image
from scipy import stats

from megatron_samoe.config import OptimizerConfig, PretrainConfig
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.planning.accounting import ParameterCount
from tests.harness.tables import table
from tools.results.measured import wrong_tables
from tools.results.page_figures import Models, models_of, rewritten, with_table, wrong_figures
from tools.results.registration import Registration, deviations, kept_plan, read_registrations
from tools.results.result_plots import Plot, course
from tools.results.scaling import scaling
from tools.results.verdicts import (
    MANY,
    Claim,
    HeldOut,
    Losses,
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


def test_a_difference_at_another_depth_is_compared_with_one_by_the_spread_of_the_first_depth() -> None:
    shallow = {"second_s/moe": [3.50, 3.52, 3.51], "second_s/pool": [3.54, 3.55, 3.56]}
    deep = {"third_deep/moe": [3.40, 3.50], "third_deep/pool": [3.41, 3.515]}
    rows = [(name, seed, loss) for name, row in shallow.items() for seed, loss in enumerate(row)]
    fit = smf.ols("y ~ C(m) + C(s)", pandas.DataFrame(rows, columns=["m", "s", "y"])).fit()
    than = {"third_deep/pool": ("second_s/pool", "second_s/moe")}
    less = Claim("G9", (("third_deep/pool", "third_deep/moe"),), "less", than=than)
    by_model = {name: dict(enumerate(row)) for name, row in (shallow | deep).items()}
    same = Claim("G8", (("second_s/pool", "second_s/moe"),), "below")
    _, found = judge(held_out(by_model, less, claims=[same, less]))
    t = (0.0125 - 0.04) / (fit.mse_resid * (2 / 2 + 2 / 3)) ** 0.5
    assert found.p == pytest.approx(stats.t.cdf(t, fit.df_resid)) and found.mean == pytest.approx(0.0125)


def test_a_loss_on_the_test_split_is_not_looked_at_before_all_of_a_claim_is_there() -> None:
    trained = {f"second_s/{name}": {1: 3.5, 2: 3.6} for name in ("moe", "good", "same", "lost")}
    found = held_out(trained, SMALL, whole=frozenset(trained) - {"second_s/same"})
    assert found.opened == {} and not list(judge(found)) and scaling(found) == ("", {})
    both = replace(found, claims=[SMALL, Claim("G8", (("second_s/good", "second_s/moe"),), "below")])
    assert list(both.opened) == ["second_s/moe", "second_s/good"] and len(list(judge(both))) == 1
    waiting = replace(both, claims=[replace(claim, waits_for=("second_s/same",)) for claim in both.claims])
    assert waiting.opened == {}, "an experiment's models are looked at together"


def plan_of(name: str, sizes: Collection[str] = ("",), missing: str = "nothing") -> StudyPlan:
    runs = [SimpleNamespace(variant=SimpleNamespace(name=name), size=size, seed=1, swept=None) for size in sizes]
    plan = SimpleNamespace(given_up=list, all_runs=lambda: runs, is_settled=bool, key_of=lambda run: f"key {run.size}")
    plan.is_finished = lambda run: missing not in f"{run.variant.name}, {run.size}"
    return cast(StudyPlan, plan)


def test_sizes_of_a_model_are_told_apart() -> None:
    plans = {"third_small_corpus": plan_of("moe", ["1 reading", "8 readings"], missing="8 readings")}
    runs = {"key 1 reading": run_of(3.9), "key 8 readings": run_of(3.5)}
    found = losses_on_test(plans, models_of(plans, runs), {})
    assert found.trained == {
        f"third_small_corpus/moe, {n}": {1: x} for n, x in (("1 reading", 4.9), ("8 readings", 4.5))
    }
    assert found.whole == {"third_small_corpus/moe, 1 reading"}


@pytest.mark.parametrize("is_whole", [False, True])
def test_further_seeds_of_a_baseline_count_once_all_of_their_experiment_is_there(is_whole: bool) -> None:
    studies = {"second_regime": "moe of 8", "third_own": "moe of 8", "third_lock": "pool, locked, softmax"}
    studies |= {"third_norm": "moe of 8, norm", "third_unipool": "pool, locked as UniPool"}
    studies |= {"second_sharing": "pool, locked", "third_later": "moe of 8, later"}
    models = {f"{study}/{name}": {1: run_of(3.5)} for study, name in studies.items()}
    models["third_own/moe of 8"] = {4: run_of(3.6)}
    models["third_lock/pool, locked, softmax"] = {1: run_of(3.4), 4: run_of(3.4)}
    plans = {study: plan_of(name, missing="nothing" if is_whole else "UniPool") for study, name in studies.items()}
    found = losses_on_test(plans, models, {})
    assert found.trained["second_regime/moe of 8"] == ({1: 4.5, 4: 4.6} if is_whole else {1: 4.5})
    lock = [v for v in judge(found) if v.claim.name == "E1, free"]
    assert [list(v.differences) for v in lock] == ([pytest.approx([-0.1, -0.2])] if is_whole else [])


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


def run_of(loss: float, train: tuple[float, ...] = (4.0, 3.0), entropy: float = 0.9) -> RunSummary:
    """Returns a run of two logged steps, 300 and 400."""
    routing = {"least_load_entropy": entropy, "largest_expert_share": 0.25}
    records: list[dict[str, Any]] = [
        {"iteration": 300 + 100 * i, "lm_loss": value, **routing, "idle_experts": i} for i, value in enumerate(train)
    ]
    records[-1] |= {"validation_loss": loss, "test_loss": loss + 1}
    count = ParameterCount(total=1_234_567, active=543_210, expert=1_000_000)
    return RunSummary("", PretrainConfig(), count, records, 0, None, Path(), 0)


TABLE = table(__file__, tuples=False)
ROOT = Path(__file__).resolve().parents[3]
STORE = ROOT / "docs/results/store"
KEPT = "fdf5963211d23ee8"


MODELS: Models = {
    "pool": {1: run_of(3.70), 2: run_of(3.72, entropy=0.7)},
    "moe, 8": {1: run_of(3.60), 2: run_of(3.63)},
    "dense": {1: run_of(3.80, train=(5.0, 4.5))},
    "moe of 8": {1: run_of(3.60)},
}
PAGE: str = TABLE["page"]


@pytest.mark.parametrize(("right", "wrong", "said"), TABLE["differences"])
def test_what_differs_is_said_with_its_line(right: str, wrong: str, said: str) -> None:
    assert PAGE.count(right) == 1
    assert any(said in problem for problem in wrong_figures(PAGE.replace(right, wrong), MODELS))


def test_a_page_may_leave_figures_of_its_sentences_unsaid_but_not_those_of_its_tables() -> None:
    page = PAGE.replace("<!-- figures from others.json -->", "")
    assert wrong_figures(page, MODELS, told="tables") == []
    assert len(wrong_figures(page.replace("0.095", "0.096"), MODELS, told="tables")) == 1
    table = "| op | speed |\n|---|---|\n| arXiv:2606.16825 | 1.25 |\n"
    assert wrong_figures(table, MODELS, told="tables") == ["line 1: nothing says what 1.25 is"]
    assert wrong_figures(table, MODELS, told="tables", measured=["| op |"]) == []
    assert wrong_figures(table.replace("1.25", ""), MODELS, told="tables") == []


@pytest.mark.parametrize(("right", "wrong", "said"), TABLE["speeds"])
def test_a_table_of_speeds_is_compared_with_what_a_benchmark_wrote(right: str, wrong: str, said: str) -> None:
    speeds = TABLE["speed page"]

    def figures() -> Iterator[list[float]]:
        yield [1144.4, 0.856, 0.80, 0.90]
        yield [979.9, 92.6, 92.1, 93.7]

    found = wrong_tables("speeds.md", speeds.replace(right, wrong), {("speeds.md", "| experts, top-k"): figures})
    assert (said in found[0] and len(found) == 1) if said else not found
    assert wrong_tables("other.md", speeds, {("speeds.md", "| experts, top-k"): figures}) == []


def test_a_page_is_rewritten_with_the_runs_figures_and_nothing_else() -> None:
    stale = PAGE.replace("0.095", "0.999").replace("-0.100", "-9.999").replace("5.000 4.500", "1.111 2.222")
    assert rewritten(stale, MODELS) == PAGE
    unread = "\nThe gain is 0.5.\n\n<!-- figures: a model of a run to come -->\n"
    unread += "\nIt is 0.5 of 0.7.\n\n<!-- figures: = 0.6 -->\n"
    assert rewritten(stale + unread, MODELS) == PAGE + unread, "of which wrong_figures says what is wrong"


def spoiled_store(folder: Path) -> Path:
    """Returns a store with one whole run and three that are not."""
    for name in (KEPT, "0" * 16, "without", "damaged"):
        shutil.copytree(STORE / KEPT, folder / name)
    (folder / "without" / "run.json").unlink()
    (folder / "damaged" / "metrics.jsonl").write_text('{"iteration": 1\n{}\n')
    return folder


def test_a_store_names_what_is_missing_damaged_or_foreign_and_goes_on(tmp_path: Path) -> None:
    runs, problems = results_store.read_store(spoiled_store(tmp_path))
    assert list(runs) == [KEPT]
    foreign, damaged, without = problems
    assert "0000000000000000 holds another run than its name says" in foreign and KEPT in foreign
    assert "damaged/metrics.jsonl:1 is not a record" in damaged
    assert "without has no run.json" in without


def test_a_study_makes_what_its_store_has_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = spoiled_store(tmp_path / "store")
    assert results_store.take(store, KEPT, tmp_path / "run") and (tmp_path / "run" / "run.json").is_file()
    assert not results_store.take(store, "0" * 16, tmp_path / "other") and not (tmp_path / "other").exists()
    assert not results_store.take(store, "1" * 16, tmp_path / "other"), "which it does not have"


@pytest.fixture(scope="module")
def registration() -> Registration:
    found = read_registrations(ROOT / "docs/results/registration.md", ROOT / "examples/studies")[-1]
    return replace(found, studies=tuple(s for s in found.studies if s.stem == "second_combination"))


def keep(store: Path, config: PretrainConfig, registration: Registration, loss: float = 3.5, **machine: object) -> str:
    """Puts a run into a store as a study does, and returns its key."""
    key = results_store.run_key(config)
    (store / key).mkdir(parents=True)
    run = {"key": key, "config": asdict(config), "vocab_size": 2048, "checkpoint_bytes": 1}
    facts = {"device": "cpu", "device_name": "x", "ranks": 1, "threads_per_rank": 1, "layout": {}}
    facts |= {"forced": dict(registration.forced), **machine}
    metrics = run_of(loss).records[-1] | {"iteration": 4800}
    for name, content in (("run.json", run), ("metrics.jsonl", metrics), ("machine.json", facts)):
        (store / key / name).write_text(json.dumps(content) + "\n")
    return key


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.mark.parametrize(("changes", "machine", "said"), TABLE["deviations"])
def test_runs_that_are_not_as_registered_are_named_with_what_differs(
    tmp_path: Path, store: Path, registration: Registration, changes: dict, machine: dict, said: str | None
) -> None:
    [study] = registration.studies
    planned = kept_plan(study, registration.data, store, tmp_path / "planned")
    run = next(r for r in planned.all_runs() if r.variant.name == "2 banks of 32" and r.swept == 0.0015)
    config = planned.config_of(run)
    section = "data" if "test_data_path" in changes else "optimizer"
    config = replace(config, **{section: replace(getattr(config, section), **changes)})
    key = keep(store, config, registration, **{"commit": "a" * 40, "patch": "", **machine})
    runs, problems = results_store.read_store(store)
    plans = {study.stem: kept_plan(study, registration.data, store, tmp_path / "kept")}
    found = deviations([replace(registration, commit="a" * 40)], plans, runs)
    assert not problems and bool(found) == (said is not None)
    assert said is None or any(key in text and said in text for text in found)


def test_a_page_that_registers_nothing_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "registration.md"
    missing = "studies = None: missing in .*; needed are studies, data, forced, threads_per_rank"
    for text, said in (("Nothing.", "must be a mapping in"), ("```yaml\ntag: x\n```\n", missing)):
        page.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_registrations(page, tmp_path)
    page.write_text("```yaml\ntag: x\nstudies: [gone]\ndata: {}\nforced: {}\nthreads_per_rank: 1\n```\n")
    with pytest.raises(ConfigError, match=r"gone.yaml is missing"):
        read_registrations(page, tmp_path)


def test_a_kept_run_is_read_by_its_own_key_alone(tmp_path: Path) -> None:
    run = results_store.read_kept(STORE / KEPT)
    assert run.config.optimizer.optimizer == "muon"
    assert run.validation["validation_loss"] == pytest.approx(3.5269, abs=1e-4)
    with pytest.raises(CheckpointError, match="not a finished run"):
        results_store.read_kept(tmp_path)


def test_a_course_is_of_the_seeds_that_both_have() -> None:
    config = PretrainConfig(optimizer=OptimizerConfig(lr=3e-3))
    rows = {"second_regime/moe of 8": {1: 3.5, 2: 3.6}, "second_sharing/scaled": {2: 3.75, 3: 9.0}}
    models = {
        name: {seed: replace(run_of(loss), config=config) for seed, loss in row.items()} for name, row in rows.items()
    }
    assert course(list(models), models) == {"scaled": {"400": 0.15}}
