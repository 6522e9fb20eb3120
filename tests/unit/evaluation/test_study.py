"""Studies: their file, the order of their runs, what is trained and what is not, and the store of results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import RUN_FILE, read_records, sharing_text
from megatron_samoe.evaluation.study import plan as plan_module
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import Run, folder_name, plan_runs, read_study
from megatron_samoe.evaluation.study.gates import problems_of
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.results import collect, results_table, unequal_arms
from tests.harness.serving import save_tiny
from tests.harness.tables import table

TABLE = table(__file__, tuples=False)
OPTIONS = TABLE["options"]
STUDY = TABLE["study"]


def write_study(folder: Path, **changes: object) -> Path:
    """Writes a study and its configuration and returns the study's path."""
    (folder / "base.yaml").write_text(yaml.safe_dump(OPTIONS))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**STUDY, **changes}.items() if v is not None}, sort_keys=False))
    return path


def test_runs_go_seed_by_seed_and_edited_ones_after_their_source(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    plan = plan_runs(study, tmp_path)
    assert [(run.seed, run.variant.name) for run in plan] == [
        (seed, name) for seed in (1, 2) for name in ("own experts", "one pool", "one pool, one bank")
    ]
    assert plan[1].variant.options == STUDY["runs"]["one pool"]
    assert plan[5].directory == tmp_path / "one-pool-one-bank" / "seed-2"
    assert (plan[5].variant.edited_from, plan[5].variant.edit) == ("one pool", "select")


@pytest.mark.parametrize(("changes", "field"), TABLE["refused"])
def test_a_wrong_study_is_refused_by_its_key(tmp_path: Path, changes: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(write_study(tmp_path, **changes))
    assert caught.value.field == field


def test_results_name_what_layers_share(tmp_path: Path) -> None:
    runs = {"own": {"expert-layout": "moe"}, "tied": {"expert-layout": "moe", "expert-sharing": "tied"}}
    study = read_study(write_study(tmp_path, runs=runs, derived=None, baseline="own", seeds=[1]))
    plan = plan_runs(study, tmp_path)
    for run in plan:
        sharing = {} if run.variant.name == "own" else {"expert_sharing": "tied"}
        save_tiny(run.checkpoints, "moe", **sharing)
        record = {"iteration": 1, "validation_loss": 2.0, "validation_perplexity": math.exp(2.0)}
        (run.directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    [comparison] = collect(study, plan)
    assert (comparison.size, comparison.seeds) == ("", [1])
    head, own, tied = results_table(study, comparison)
    assert (own[head.index("sharing")], tied[head.index("sharing")]) == ("own", "tied 0*2")
    first, second = comparison.to_json()["variants"]
    assert [first["sharing"], second["sharing"]] == ["own", "tied 0*2"]
    assert first["expert_parameters"] == 2 * second["expert_parameters"], "one set in place of two layers' own"
    assert first["active_parameters"] == second["active_parameters"] and not unequal_arms(study, comparison.groups)


@pytest.mark.parametrize(("edit", "sharing"), [("select", "tied"), ("select", "pool"), ("fold", "own")])
def test_an_edit_that_will_not_fit_is_refused_before_training(tmp_path: Path, edit: str, sharing: str) -> None:
    runs = {"own": {"expert-layout": "moe"}, "shared": {"expert-layout": "moe", "expert-sharing": sharing}}
    derived = {"edited": {"from": "shared", "edit": edit}}
    runner = StudyPlan(read_study(write_study(tmp_path, runs=runs, derived=derived, baseline="own")), tmp_path, ())
    with pytest.raises(ConfigError, match=sharing) as caught:
        runner.check()
    assert caught.value.field == "derived.edited.edit"


def test_a_run_that_is_not_legal_is_refused_before_any_trains(tmp_path: Path) -> None:
    runs = {"own": {"expert-layout": "moe"}, "too many": {"expert-layout": "moe", "moe-router-topk": 99}}
    plan = StudyPlan(read_study(write_study(tmp_path, runs=runs, derived=None, baseline="own")), tmp_path, ())
    with pytest.raises(ConfigError, match="run 'too many' of the study: --moe-router-topk = 99"):
        plan.check()


def test_folder_names_are_plain() -> None:
    assert folder_name("SaMoE, one bank (P = 2)") == "samoe-one-bank-p-2"


def test_a_run_leaves_out_what_its_variants_own_options_make_useless(tmp_path: Path) -> None:
    own = {"plain": {"lr-decay-style": "linear"}, "dense": {"expert-layout": "dense"}, "own rate": {"lr": 1}}
    others = {"runs": {"decays": {}, **own}, "sizes": {"s": {"moe-router-topk": 2}}}
    study = read_study(write_study(tmp_path, derived=None, baseline=None, **others))
    common = "--lr 0.5 --lr-decay-style WSD --lr-wsd-decay-iters 1 --expert-layout moe --no-swiglu".split()
    plan = StudyPlan(study, tmp_path, tuple(common))
    first = {run.variant.name: run for run in plan.plan() if run.seed == 1}
    found = {name: plan.config_of(run) for name, run in first.items()}
    assert [c.optimizer.lr_wsd_decay_iters for c in found.values()] == [1, None, 1, 1]
    assert [c.moe.expert_layout for c in found.values()] == ["moe", "moe", "dense", "moe"]
    assert [c.optimizer.lr for c in found.values()] == [0.5, 0.5, 0.5, 1.0]
    for name, run in first.items():
        assert parse_pretrain_args(plan.flags_of(run)) == found[name], "the program is given what was planned"
    study = read_study(write_study(tmp_path, runs={"idle": {"lr-wsd-decay-iters": 3}}, derived=None, baseline=None))
    with pytest.raises(ConfigError, match="--lr-wsd-decay-iters = 3: needs --lr-decay-style WSD"):
        StudyPlan(study, tmp_path, ()).check()


def test_an_option_that_is_not_known_is_refused_by_its_run(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, runs={"a": {"num-layer": 3}}, derived=None, baseline=None))
    with pytest.raises(ConfigError, match=r"num-layer = 3: .*run 'a'.* 'num_layers'"):
        StudyPlan(study, tmp_path, ()).check()


#: Everything that a study may ask for, at once.
WHOLE = TABLE["whole"]
SLOW_DECAY = {**OPTIONS, **TABLE["slow decay"]}


def write_atomically(folder: Path, **changes: object) -> Path:
    """Writes a study of sweeps, edits and gates."""
    path = write_study(folder, **{**WHOLE, **changes})
    (folder / "base.yaml").write_text(yaml.safe_dump(SLOW_DECAY))
    return path


def test_a_gate_without_a_baseline_looks_at_its_arm_alone(tmp_path: Path) -> None:
    gate = {"arm": "pool", "load-entropy": 0.9, "by-step": 4}
    study = read_study(write_atomically(tmp_path, derived=None, sweep=None, gates=[gate]))
    plan = StudyPlan(study, tmp_path, ())
    run = next(run for run in plan.plan() if run.variant.name == "pool")
    assert problems_of(plan, study.gates[0]) == []
    run.directory.mkdir(parents=True)
    kept = {"key": "0", "config": {}, "vocab_size": 8, "checkpoint_bytes": 8}
    (run.directory / RUN_FILE).write_text(json.dumps(kept))
    records = [{"iteration": step, "least_load_entropy": entropy} for step, entropy in ((4, 0.5), (8, 0.95))]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert problems_of(plan, study.gates[0]) == ["pool, seed 1 has a least load entropy of 0.50 by step 4, not 0.9"]


def test_a_dense_arm_leaves_out_what_experts_share(tmp_path: Path) -> None:
    runs = {"dense": {"expert-layout": "dense"}, "own": {"expert-layout": "moe", "expert-sharing": [0, 0]}}
    study = read_study(write_atomically(tmp_path, runs=runs, derived=None, sweep=None, gates=None))
    dense, own = (StudyPlan(study, tmp_path, ()).config_of(run) for run in plan_runs(study, tmp_path))
    assert (dense.optimizer.moe_router_lr_mult, own.optimizer.moe_router_lr_mult) == (0.5, 1.0)
    assert (sharing_text(dense), sharing_text(own)) == ("-", "tied 0*2")
    runs = {"dense": {"expert-layout": "dense", "moe-router-lr-mult": 1.0}, "own": {}}
    typo = read_study(write_atomically(tmp_path, runs=runs, derived=None, sweep=None, gates=None))
    with pytest.raises(ConfigError, match="--moe-router-lr-mult"):  # what an arm itself asks for is refused, not hidden
        StudyPlan(typo, tmp_path, ()).config_of(plan_runs(typo, tmp_path)[0])
    common = ("--moe-router-lr-mult", "1.0", "--expert-layout", "moe")
    plan = StudyPlan(study, tmp_path, common)
    assert [plan.config_of(run) for run in plan_runs(study, tmp_path)] == [dense, own], (
        "what is said to all arms is for some"
    )


def test_an_option_of_experts_is_not_swept_for_a_dense_model(tmp_path: Path) -> None:
    runs = {"dense": {"expert-layout": "dense"}, "own": {"expert-layout": "moe"}}
    sweep = {"option": "moe-expert-lr-mult", "values": [0.25, 0.5, 1.0]}
    study = read_study(write_atomically(tmp_path, runs=runs, derived=None, sweep=sweep, gates=None))
    plan = StudyPlan(study, tmp_path, ())
    swept = [run for run in plan.all_runs() if run.swept is not None]
    assert [(run.variant.name, run.swept) for run in swept] == [("own", 0.25), ("own", 0.5), ("own", 1.0)]
    assert [plan.is_settled(run) for run in plan.plan()] == [True, False]


def test_keys_tell_what_decides_a_result(tmp_path: Path) -> None:
    runner = StudyPlan(read_study(write_atomically(tmp_path)), tmp_path, ())
    run = runner.plan()[0]
    key = runner.key_of(run)
    other = [
        StudyPlan(read_study(tmp_path / "study.yaml"), tmp_path / "x", flags).key_of(run)
        for flags in (("--num-threads", "2"), ("--seed", "7"), ("--weight-decay", "0.2"))
    ]
    assert other[0] == other[1] == key != other[2], "threads and a seed that the run's own replaces decide nothing"
    words = []
    for content in (b"aa", b"ab"):
        (tmp_path / "d.idx").write_bytes(content)
        (tmp_path / "d.bin").write_bytes(b"1234")
        flags = ("--no-mock-data", "--train-data-path", str(tmp_path / "d"))
        words.append(StudyPlan(read_study(tmp_path / "study.yaml"), tmp_path, flags).key_of(run))
    assert len({key, *words}) == 3, "other data are another result"


def write_kept(folder: Path, config: PretrainConfig) -> str:
    """Writes the file that says that a run is finished, and returns its key."""
    key = results_store.run_key(config)
    content = {"key": key, "config": asdict(config), "vocab_size": 256, "checkpoint_bytes": 0}
    (folder / RUN_FILE).write_text(json.dumps(content))
    return key


def test_a_store_keeps_losses_whole_and_lists_of_experts_short(tmp_path: Path) -> None:
    run = tmp_path / "run"
    row = {"iteration": 5, "lm_loss": 3.14159265358979, "validation_loss": 3.0}
    row["expert_load"] = [[0.123456789, 7], [0.5, 0.25]]
    run.mkdir()
    key = write_kept(run, PretrainConfig())
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    results_store.put(tmp_path / "store", run)
    assert results_store.take(tmp_path / "store", key, tmp_path / "taken")
    kept = json.loads((tmp_path / "taken/metrics.jsonl").read_text())
    assert kept == {**row, "expert_load": [[0.123, 7], [0.5, 0.25]]}


@pytest.mark.parametrize("num_rows", [1, 48, 49, 240, 241])
def test_a_store_keeps_lists_of_few_records_and_the_last(tmp_path: Path, num_rows: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    key = write_kept(run, PretrainConfig())
    rows = [{"iteration": i, "validation_loss": 3.0, "expert_load": [[0.5, 0.5]]} for i in range(num_rows)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results_store.put(tmp_path / "store", run)
    kept = (tmp_path / "store" / key / "metrics.jsonl").read_text()
    rows = [json.loads(row) for row in kept.splitlines()]
    listed = [row["iteration"] for row in rows if "expert_load" in row]
    assert len(rows) == num_rows and listed[-1] == num_rows - 1
    assert min(num_rows, 24) <= len(listed) <= results_store.LISTED_ROWS + 1
    assert results_store.take(tmp_path / "store", key, tmp_path / "taken")
    assert (tmp_path / "taken/metrics.jsonl").read_text() == kept  # what was thinned is thinned no further


#: Two models that differ by their experts, and a sweep.
RUNS = {"own": {"expert-layout": "moe"}, "shared": {"expert-layout": "samoe"}}
SWEEP = {"option": "lr", "values": [0.01, 0.02, 0.04], "choose": "tried", "extensions": 1}


def finish(plan: StudyPlan, run: Run, loss: float) -> None:
    """Leaves what a finished run leaves, as far as a plan asks."""
    run.directory.mkdir(parents=True)
    (run.directory / "metrics.jsonl").write_text(json.dumps({"iteration": 2, "validation_loss": loss}) + "\n")
    write_kept(run.directory, plan.config_of(run))


def finish_sweep(plan: StudyPlan, variant: str, losses: Sequence[float]) -> list[Run]:
    swept = [run for run in plan.all_runs() if run.swept and run.variant.name == variant]
    for run, loss in zip(swept, losses, strict=True):
        finish(plan, run, loss)
    return swept


def plan_of(folder: Path, **changes: object) -> StudyPlan:
    study = read_study(write_study(folder, runs=RUNS, derived=None, baseline="own", **changes))
    return StudyPlan(study, folder / "runs", ())


def test_the_sweeps_best_run_is_found_in_place_of_the_first_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, sweep=SWEEP)
    swept = finish_sweep(plan, "shared", (3.0, 2.8, 2.9))
    first, second = [run for run in plan.plan() if run.variant.name == "shared"]
    assert plan.optima()[("shared", "")].value == 0.02
    assert plan.key_of(first) == plan.key_of(swept[1]) != plan.key_of(second)
    plan.store = tmp_path / "store"
    results_store.put(plan.store, swept[1].directory)
    assert plan.take(first) and plan.is_finished(first), "so it is not trained again"


def test_a_value_between_is_the_vertex_of_numpys_parabola(tmp_path: Path) -> None:
    plan, losses = plan_of(tmp_path, sweep=SWEEP | {"choose": "vertex"}), (3.0, 2.8, 2.9)
    finish_sweep(plan, "own", losses)
    a, b, _ = np.polyfit(np.log(SWEEP["values"]), losses, 2)
    assert plan.optima()[("own", "")].value == pytest.approx(np.exp(-b / (2 * a)))


def test_a_best_value_at_an_end_is_followed_by_one_beyond(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, sweep=SWEEP)
    finish_sweep(plan, "own", (2.7, 2.8, 2.9))
    beyond = [r for r in plan.all_runs() if r.swept == 0.005]
    assert len(beyond) == 1 and not plan.optima()
    finish(plan, beyond[0], 2.75)
    assert plan.optima()[("own", "")].value == 0.01


def test_records_are_read_once_and_again_when_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(plan_module, "read_records", lambda path: read.append(path) or read_records(path))
    plan = plan_of(tmp_path, sweep=SWEEP)
    swept = finish_sweep(plan, "own", (3.0, 2.8, 2.9))
    assert [plan.optima()[("own", "")].value for _ in range(5)] == [0.02] * 5
    assert sorted(read) == sorted(run.directory / "metrics.jsonl" for run in swept)
    (swept[2].directory / "metrics.jsonl").write_text(json.dumps({"iteration": 2, "validation_loss": 2.75}) + "\n")
    assert plan.optima() == {}, "the best value lies at an end now"
    assert len(read) == len(swept) + 1


@pytest.mark.parametrize(("behind", "seeds"), [(0.031, [1]), (0.029, [1, 2, 3]), (-0.5, [1, 2, 3])])
def test_a_variant_too_far_behind_gets_no_more_seeds(tmp_path: Path, behind: float, seeds: list[int]) -> None:
    plan = plan_of(tmp_path, seeds=[1, 2, 3], **{"give-up": 0.03})
    own, shared = plan.plan()[:2]
    finish(plan, shared, 3.0 + behind)
    assert len(plan.plan()) == 6, "nothing is known of the baseline"
    finish(plan, own, 3.0)
    assert [run.seed for run in plan.plan() if run.variant.name == "shared"] == seeds
    assert [run.seed for run in plan.plan() if run.variant.name == "own"] == [1, 2, 3]
