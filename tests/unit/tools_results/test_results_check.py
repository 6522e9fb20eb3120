"""Results that check themselves: a page's figures against runs, a store's runs against their keys and their registration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.evaluation.study import results_store
from tests.harness.tables import table
from tests.unit.tools_results.made_runs import run_of
from tools.results.measured import wrong_tables
from tools.results.page_figures import Models, rewritten, wrong_figures
from tools.results.registration import Registration, deviations, kept_plan, read_registrations

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
PAGE = """# Losses

The pool is 0.095 ± 0.064 behind, `--lr 0.001` and [a picture](x-0.5678.png) aside, and 3.7100.

<!-- figures: pool - moe, 8; ± pool - moe, 8; pool -->

| model | |
|---|---|
| dense | 3.8000, -0.100, 1.235 |
| by step | 5.000 4.500 |

<!-- figures: dense; pool - dense #1; total dense;
train dense at 300..400/100 -->

Entropy 0.70; idle 0.50; step 0.40; 0.10.

<!-- figures: lowest entropy pool; idle pool; = 0.40; pool - moe of 8 -->

Others have 1.234.

<!-- figures from others.json -->
"""


def test_a_page_with_the_runs_figures_is_right() -> None:
    assert wrong_figures(PAGE, MODELS) == []


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


SPEEDS = """# Speeds

| experts, top-k | tokens/s | of dense, range |
|---|---|---|
| 8, 1 | 1,144 | 0.86x (0.8-0.9) |
| 8, 2 | 980 | 93 % (92-94) |
"""


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("", "", ""),
        ("1,144", "1,145", "line 5"),
        ("0.86x", "0.85x", "line 5: ['1,144', '0.85', '0.8', '0.9'] is ['1,144', '0.86', '0.8', '0.9'] by its file"),
        ("(92-94)", "(92)", "line 6"),
        ("| 8, 2 | 980 | 93 % (92-94) |\n", "", "line 3: has 1 rows, and its files 2"),
        ("| experts, top-k", "| experts", "no table begins with '| experts, top-k'"),
    ],
)
def test_a_table_of_speeds_is_compared_with_what_a_benchmark_wrote(right: str, wrong: str, said: str) -> None:
    def figures() -> Iterator[list[float]]:
        yield [1144.4, 0.856, 0.80, 0.90]
        yield [979.9, 92.6, 92.1, 93.7]

    found = wrong_tables("speeds.md", SPEEDS.replace(right, wrong), {("speeds.md", "| experts, top-k"): figures})
    assert (said in found[0] and len(found) == 1) if said else not found
    assert wrong_tables("other.md", SPEEDS, {("speeds.md", "| experts, top-k"): figures}) == []


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


@pytest.mark.parametrize(
    ("changes", "machine", "said"),
    [
        ({}, {}, None),
        ({"lr": 0.0016}, {}, "2 banks of 32, seed 1, at 0.0015 it differs in --lr 0.0016 (registered: 0.0015)"),
        ({"lr": 0.0015, "weight_decay": 0.3}, {}, "--weight-decay 0.3 (registered: None)"),
        ({"test_data_path": ("other",)}, {}, "--test-data-path ['other']"),
        ({}, {"forced": {}}, "MKL_CBWR=None, registered is AVX2"),
        ({}, {"threads_per_rank": 2}, "2 threads, registered are 1"),
    ],
)
def test_runs_that_are_not_as_registered_are_named_with_what_differs(
    tmp_path: Path, store: Path, registration: Registration, changes: dict, machine: dict, said: str | None
) -> None:
    [study] = registration.studies
    planned = kept_plan(study, registration.data, store, tmp_path / "planned")
    run = next(r for r in planned.all_runs() if r.variant.name == "2 banks of 32" and r.swept == 0.0015)
    config = planned.config_of(run)
    section = "data" if "test_data_path" in changes else "optimizer"
    config = replace(config, **{section: replace(getattr(config, section), **changes)})
    key = keep(store, config, registration, **machine)
    runs, problems = results_store.read_store(store)
    plans = {study.stem: kept_plan(study, registration.data, store, tmp_path / "kept")}
    found = deviations([registration], plans, runs)
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


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"commit": "a" * 40, "patch": ""}, None),
        ({"commit": "b" * 40, "patch": ""}, f"has the commit '{'b' * 40}', registered is '{'a' * 40}'"),
        ({"commit": "a" * 40, "patch": "diff"}, "has the patch 'diff', registered is ''"),
        ({}, "has the commit None"),
    ],
)
def test_a_run_of_another_commit_than_the_registered_is_named(
    tmp_path: Path, store: Path, registration: Registration, machine: dict, said: str | None
) -> None:
    [study] = registration.studies
    planned = kept_plan(study, registration.data, store, tmp_path / "planned")
    keep(store, planned.config_of(planned.all_runs()[0]), registration, **machine)
    plans = {study.stem: kept_plan(study, registration.data, store, tmp_path / "kept")}
    runs, _ = results_store.read_store(store)
    found = deviations([replace(registration, commit="a" * 40)], plans, runs)
    assert any(said in text for text in found) if said else not found


def test_a_kept_run_is_read_by_its_own_key_alone(tmp_path: Path) -> None:
    run = results_store.read_kept(STORE / KEPT)
    assert run.config.optimizer.optimizer == "muon"
    assert run.validation["validation_loss"] == pytest.approx(3.5269, abs=1e-4)
    with pytest.raises(CheckpointError, match="not a finished run"):
        results_store.read_kept(tmp_path)
