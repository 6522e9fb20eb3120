"""Studies: their file, the order of their runs, going on after a stop, and what their differences are worth."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_samoe.cli.study import main
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import sharing_text
from megatron_samoe.evaluation.study.definition import folder_name, plan_runs, read_study
from megatron_samoe.evaluation.study.results import collect, paired_difference, results_table
from megatron_samoe.evaluation.study.runner import StudyRunner
from tests.harness.serving import save_tiny

OPTIONS = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 16, "num_experts": 2,
    "micro_batch_size": 2, "global_batch_size": 2, "train_iters": 2, "eval_interval": 2, "eval_iters": 1,
    "log_interval": 1, "lr": 0.01, "mock_data": True, "tokenizer_type": "ByteTokenizer", "num_threads": 1,
}  # fmt: skip
STUDY = {
    "title": "Two",
    "config": "base.yaml",
    "seeds": [1, 2],
    "baseline": "own experts",
    "runs": {
        "own experts": {"expert-layout": "moe"},
        "one pool": {"expert-layout": "samoe", "num-expert-banks": 2, "samoe-freeze-coefficients": True},
    },
    "derived": {"one pool, one bank": {"from": "one pool", "edit": "select"}},
}


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
    assert plan[1].variant.flags == (
        "--expert-layout", "samoe", "--num-expert-banks", "2", "--samoe-freeze-coefficients"
    )  # fmt: skip
    assert plan[5].directory == tmp_path / "one-pool-one-bank" / "seed-2"
    assert (plan[5].variant.edited_from, plan[5].variant.edit) == ("one pool", "select")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": "1"}, "seeds"),
        ({"seed": [1]}, "seed"),
        ({"config": "nowhere.yaml"}, "config"),
        ({"baseline": "dense"}, "baseline"),
        ({"runs": {"a": 3}}, "runs"),
        ({"runs": {"a b": {}, "a-b": {}}, "derived": None, "baseline": None}, "runs"),
        ({"derived": {"x": {"from": "nobody", "edit": "select"}}}, "derived.x.from"),
        ({"derived": {"x": {"from": "one pool", "edit": "melt"}}}, "derived.x.edit"),
        ({"derived": {"x": {"from": "one pool", "edits": "fold"}}}, "derived.x.edits"),
    ],
)
def test_a_wrong_study_is_refused_by_its_key(tmp_path: Path, changes: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(write_study(tmp_path, **changes))
    assert caught.value.field == field


def test_a_study_without_runs_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs.*a study needs title, config, seeds and runs"):
        read_study(write_study(tmp_path, runs=None))


#: Arms by name, their options, and how tables name what their four layers share.
SHARING = {
    "own": ({"expert-layout": "moe"}, "own"),
    "combined": ({"expert-layout": "samoe", "num-expert-banks": 3}, "combined (3 banks)"),
    "tied": ({"expert-layout": "moe", "expert-sharing": "tied", "num-expert-sets": 2}, "tied 0*2,1*2"),
    "a map": ({"expert-layout": "moe", "expert-sharing": [0, 1, 1, 0]}, "tied 0,1*2,0"),
    "scaled": ({"expert-layout": "moe", "expert-sharing": "scaled:0*4"}, "scaled 0*4"),
    "one for all": ({"expert-layout": "moe", "expert-sharing": "pool"}, "pool"),
    "ends apart": ({"expert-layout": "moe", "expert-sharing": "own,combined*2,own"}, "own,combined*2,own (2 banks)"),
    "dense": ({"expert-layout": "dense"}, "-"),
}


def test_arms_may_share_experts_in_every_way(tmp_path: Path) -> None:
    runs = {name: {**options, "num-layers": 4} for name, (options, _) in SHARING.items()}
    study = read_study(write_study(tmp_path, runs=runs, derived=None, baseline="own"))
    runner = StudyRunner(study, tmp_path, ())
    runner.check()
    found = {run.variant.name: sharing_text(runner.config_of(run)) for run in runner.plan()}
    assert found == {name: text for name, (_, text) in SHARING.items()}


def test_results_name_what_layers_share(tmp_path: Path) -> None:
    runs = {"own": {"expert-layout": "moe"}, "tied": {"expert-layout": "moe", "expert-sharing": "tied"}}
    study = read_study(write_study(tmp_path, runs=runs, derived=None, baseline="own", seeds=[1]))
    plan = plan_runs(study, tmp_path)
    for run in plan:
        sharing = {} if run.variant.name == "own" else {"expert_sharing": "tied"}
        save_tiny(run.checkpoints, "moe", **sharing)
        record = {"iteration": 1, "validation_loss": 2.0, "validation_perplexity": math.exp(2.0)}
        (run.directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    results = collect(study, plan)
    head, own, tied = results_table(study, results)
    assert (own[head.index("sharing")], tied[head.index("sharing")]) == ("own", "tied 0*2")
    assert [r.to_json()["sharing"] for r in results] == ["own", "tied 0*2"]
    assert results[0].expert_parameters == 2 * results[1].expert_parameters, "one set in place of two layers' own"
    assert results[0].active_parameters == results[1].active_parameters


@pytest.mark.parametrize(("edit", "sharing"), [("select", "tied"), ("select", "pool"), ("fold", "own")])
def test_an_edit_that_will_not_fit_is_refused_before_training(tmp_path: Path, edit: str, sharing: str) -> None:
    runs = {"own": {"expert-layout": "moe"}, "shared": {"expert-layout": "moe", "expert-sharing": sharing}}
    derived = {"edited": {"from": "shared", "edit": edit}}
    runner = StudyRunner(read_study(write_study(tmp_path, runs=runs, derived=derived, baseline="own")), tmp_path, ())
    with pytest.raises(ConfigError, match=sharing) as caught:
        runner.check()
    assert caught.value.field == "derived.edited.edit"


def test_folder_names_are_plain() -> None:
    assert folder_name("SaMoE, one bank (P = 2)") == "samoe-one-bank-p-2"


def test_differences_are_taken_within_seeds() -> None:
    # Seeds differ by 1, the models by about 0.1 in each: the spread over seeds must not hide it.
    difference = paired_difference([5.1, 6.12, 7.08], [5.0, 6.0, 7.0])
    assert difference.mean == pytest.approx(0.1)
    assert difference.half_width == pytest.approx(4.303 * 0.02 / math.sqrt(3), rel=1e-3)
    assert math.isnan(paired_difference([1.0], [2.0]).half_width)


def test_a_study_runs_goes_on_and_refuses_other_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    command = [str(write_study(tmp_path)), "--output-dir", str(out), "--seeds", "3"]
    assert main(command) == 0, capfd.readouterr()
    results = json.loads((out / "results.json").read_text())
    by_name = {v["name"]: v for v in results["variants"]}
    assert list(by_name) == ["own experts", "one pool", "one pool, one bank"]
    assert by_name["own experts"]["difference"] is None
    # Two banks for two layers, each begun on its own bank: the coefficients are frozen at one bank, so nothing changes.
    assert by_name["one pool, one bank"]["losses"] == by_name["one pool"]["losses"]
    assert by_name["one pool, one bank"]["tokens_per_s"] is None
    metrics = [json.loads(line) for line in (out / "one-pool/seed-3/metrics.jsonl").read_text().splitlines()]
    assert by_name["one pool"]["losses"] == [metrics[-1]["validation_loss"]]
    assert by_name["one pool"]["difference"]["half_width"] is None

    capfd.readouterr()
    with (out / "one-pool/seed-3/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "lm_l')  # as a kill leaves it
    assert main(command) == 0
    assert capfd.readouterr().out.count("finished before") == 3
    assert main([*command, "--lr", "0.02"]) != 0
    assert "--lr 0.01 (now 0.02)" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--learn-rate", "1"])
    assert "--learn-rate" in capfd.readouterr().err


def test_flags_for_all_runs_leave_the_variants_what_they_are(tmp_path: Path) -> None:
    runner = StudyRunner(read_study(write_study(tmp_path)), tmp_path, ("--expert-layout", "dense", "--lr", "0.5"))
    configs = [runner.config_of(run) for run in runner.plan()[:2]]
    assert [config.moe.expert_layout for config in configs] == ["moe", "samoe"]
    assert [config.optimizer.lr for config in configs] == [0.5, 0.5]


def test_a_run_that_fails_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = {"load": str(tmp_path / "none"), "exit-on-missing-checkpoint": True}
    runs = {"broken": {"expert-layout": "samoe", **missing}, "whole": {}}
    study = write_study(
        tmp_path, runs=runs, derived={"folded": {"from": "broken", "edit": "fold"}}, seeds=[1], baseline=None
    )
    assert main([str(study), "--output-dir", str(tmp_path / "runs")]) == 1
    said = capfd.readouterr()
    assert "2/3 whole, seed 1: validation loss" in said.out
    assert "1/3 broken, seed 1: A run ended with status" in said.err and "none" in said.err
    assert "3/3 folded, seed 1: broken is not finished" in said.err
    assert "No seed is finished for every model" in said.err


def test_a_signal_to_the_study_ends_its_run_with_a_checkpoint(tmp_path: Path) -> None:
    study = write_study(tmp_path, runs={"only": {"train-iters": 10**6}}, derived=None, baseline=None)
    folder = tmp_path / "runs/only/seed-1"
    code = "import sys; from megatron_samoe.cli.study import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(study), "--output-dir", str(tmp_path / "runs")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(1200):
            if process.poll() is not None or (
                (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size
            ):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "goes on from the last checkpoint" in error
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").is_file(), (folder / "log.txt").read_text()
