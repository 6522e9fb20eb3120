"""Studies: their file, the order of their runs, going on after a stop, and what their differences are worth."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from megatron_samoe.cli.report import main as report_main
from megatron_samoe.cli.study import main
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.folder_lock import FolderInUseError, folder_lock
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import RUN_FILE, sharing_text
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import folder_name, plan_runs, read_study
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.results import collect, results_table, unequal_arms
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
        ({"runs": {"a": 3}}, "runs.a"),
        ({"runs": {"a b": {}, "a-b": {}}, "derived": None, "baseline": None}, "runs"),
        ({"derived": {"x": {"from": "nobody", "edit": "select"}}}, "derived.x.from"),
        ({"derived": {"x": {"from": "one pool", "edit": "melt"}}}, "derived.x.edit"),
        ({"derived": {"x": {"from": "one pool", "edits": "fold"}}}, "derived.x.edits"),
        ({"margin": "wide"}, "margin"),
        ({"sizes": {"wide": 3}}, "sizes.wide"),
        ({"sweep": {"option": "lr", "values": [1, 2]}}, "sweep.values"),
        ({"sweep": {"option": "lr", "values": [3, 2, 1]}}, "sweep.values"),
        ({"sweep": {"option": "lr", "values": [1, 2, 3], "seed": 1}}, "sweep.seed"),
        ({"sweep": {"values": [1, 2, 3]}}, "sweep.option"),
        ({"branches": [20, 10]}, "branches"),
        ({"branches": [0]}, "branches"),
        ({"gates": [{"arm": "nobody", "at-most": 0}]}, "gates.1.arm"),
        ({"gates": [{"arm": "one pool"}]}, "gates.1"),
    ],
)
def test_a_wrong_study_is_refused_by_its_key(tmp_path: Path, changes: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(write_study(tmp_path, **changes))
    assert caught.value.field == field


def test_a_study_without_runs_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"runs = None: missing in .*study.yaml; needed are title, config, seeds, runs"
    ):
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
    runner = StudyPlan(study, tmp_path, ())
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
    [comparison] = collect(study, plan)
    results = comparison.variants
    assert (comparison.size, comparison.steps, comparison.seeds) == ("", None, [1])
    head, own, tied = results_table(study, results)
    assert (own[head.index("sharing")], tied[head.index("sharing")]) == ("own", "tied 0*2")
    assert [r.sharing for r in results] == ["own", "tied 0*2"]
    assert results[0].expert_parameters == 2 * results[1].expert_parameters, "one set in place of two layers' own"
    assert results[0].active_parameters == results[1].active_parameters and not unequal_arms(study, results)


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


def test_a_study_runs_goes_on_and_refuses_other_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    command = [str(write_study(tmp_path)), "--output-dir", str(out), "--seeds", "3", "--full-priority"]
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
    runner = StudyPlan(read_study(write_study(tmp_path)), tmp_path, ("--expert-layout", "dense", "--lr", "0.5"))
    configs = [runner.config_of(run) for run in runner.plan()[:2]]
    assert [config.moe.expert_layout for config in configs] == ["moe", "samoe"]
    assert [config.optimizer.lr for config in configs] == [0.5, 0.5]


@pytest.mark.night
def test_a_run_that_fails_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = {"load": str(tmp_path / "none"), "exit-on-missing-checkpoint": True}
    runs = {"broken": {"expert-layout": "samoe", **missing}, "whole": {}}
    study = write_study(
        tmp_path, runs=runs, derived={"folded": {"from": "broken", "edit": "fold"}}, seeds=[1], baseline=None
    )
    assert main([str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]) == 1
    said = capfd.readouterr()
    assert "whole, seed 1: validation loss" in said.out
    assert "broken, seed 1: A run ended with status" in said.err and "none" in said.err
    assert "folded, seed 1: broken, seed 1 is not finished" in said.err
    assert "No seed is finished for every model" in said.err


def test_a_signal_to_the_study_ends_its_run_with_a_checkpoint(tmp_path: Path) -> None:
    study = write_study(tmp_path, runs={"only": {"train-iters": 10**6}}, derived=None, baseline=None)
    folder = tmp_path / "runs/only/seed-1"
    code = "import sys; from megatron_samoe.cli.study import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]
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


#: Everything that a study may ask for, at once.
WHOLE = {
    "title": "Whole",
    "seeds": [1],
    "baseline": "own",
    "runs": {"own": {"expert-layout": "moe", "lr": 0.01}, "pool": {"expert-layout": "samoe", "num-expert-banks": 2}},
    "derived": {"one bank": {"from": "pool", "edit": "select"}},
    "sweep": {"option": "lr", "values": ["1e-3", 4e-3, 1.6e-2], "train-iters": 3, "extensions": 0},
    "branches": [5],
    "gates": [{"arm": "pool", "baseline": "own", "at-most": 9}],
}
SLOW_DECAY = {**OPTIONS, "train_iters": 10, "eval_interval": 100, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 4,
              "moe_router_lr_mult": 1.0}  # fmt: skip


def write_whole(folder: Path, **changes: object) -> Path:
    """Writes a study of sweeps, branches, edits and gates."""
    path = write_study(folder, **{**WHOLE, **changes})
    (folder / "base.yaml").write_text(yaml.safe_dump(SLOW_DECAY))
    return path


@pytest.mark.night
def test_sweeps_branches_and_a_store_make_one_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study, store = write_whole(tmp_path), tmp_path / "store"
    command = [str(study), "--store", str(store), "--full-priority", "--jobs", "2"]
    assert main([*command, "--output-dir", str(tmp_path / "a")]) == 0, capfd.readouterr()
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert [v["name"] for v in results["variants"]] == ["own", "pool", "one bank"]
    assert [(other["steps"], len(other["variants"])) for other in results["others"]] == [(5, 2)]
    assert [o["variant"] for o in results["optima"]] == ["pool"], "the other's rate is fixed"
    found = next(o["value"] for o in results["optima"] if o["variant"] == "pool")
    flags = next(c for c in results["commands"] if "a/pool/seed-1" in c)
    assert f"--lr {found:.6g}" in flags
    page = (tmp_path / "a/status.html").read_text()
    assert "8 of 8 runs finished" in page and "data:image/png;base64" in page

    assert report_main(["--study", str(tmp_path / "a/results.json"), "--output", str(tmp_path / "report.html")]) == 0
    for plot in ("differences", "lengths"):
        assert (tmp_path / f"{plot}.png").read_bytes().startswith(b"\x89PNG")

    # A branch is what a run of its own length would be.
    branch = json.loads((tmp_path / "a/own/steps-5/seed-1/metrics.jsonl").read_text().splitlines()[-1])
    alone = ["--train-iters", "5", "--lr-wsd-decay-iters", "2", "--lr"]
    pretrain = [sys.executable, "-m", "megatron_samoe", "pretrain", "--config", str(tmp_path / "base.yaml"), "--expert-layout", "moe",
                "--seed", "1", "--run-dir", str(tmp_path / "alone"), *alone, "0.01"]  # fmt: skip
    subprocess.run(pretrain, check=True, capture_output=True)
    expected = json.loads((tmp_path / "alone/metrics.jsonl").read_text().splitlines()[-1])
    assert branch["iteration"] == 5 and branch["validation_loss"] == expected["validation_loss"]

    # The store holds all of it: elsewhere nothing is trained again, and the results are the same.
    capfd.readouterr()
    assert main([*command, "--output-dir", str(tmp_path / "b")]) == 0
    said = capfd.readouterr().out
    assert ": validation loss" not in said and said.count("found in the store") >= 7
    again = json.loads((tmp_path / "b/results.json").read_text())
    assert [v["losses"] for v in again["variants"]] == [v["losses"] for v in results["variants"]]
    assert not list((tmp_path / "b").rglob("checkpoints"))


@pytest.mark.night
def test_a_gate_stops_a_study_whose_regime_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = write_whole(
        tmp_path, sweep=None, branches=None, derived=None, seeds=[1],
        runs={"own": {"expert-layout": "moe"}, "pool": {"expert-layout": "samoe"}, "never": {"expert-layout": "moe"}},
        gates=[{"arm": "pool", "baseline": "own", "at-most": -9}],
    )  # fmt: skip
    assert main([str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]) == 1
    said = capfd.readouterr()
    assert "stops at a gate: pool - own is" in said.err and "at most -9" in said.err
    assert not (tmp_path / "runs/never/seed-1/run.json").exists()


def test_a_dense_arm_leaves_out_what_experts_share(tmp_path: Path) -> None:
    runs = {"dense": {"expert-layout": "dense"}, "own": {"expert-layout": "moe"}}
    study = read_study(write_whole(tmp_path, runs=runs, derived=None, sweep=None, branches=None, gates=None))
    dense, own = (StudyPlan(study, tmp_path, ()).config_of(run) for run in plan_runs(study, tmp_path))
    assert (dense.optimizer.moe_router_lr_mult, own.optimizer.moe_router_lr_mult) == (0.5, 1.0)
    typo = read_study(
        write_whole(tmp_path, runs={"dense": {"expert-layout": "dense", "moe-router-lr-mult": 1.0}, "own": {}}, derived=None,
                    sweep=None, branches=None, gates=None)
    )  # fmt: skip
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
    study = read_study(write_whole(tmp_path, runs=runs, derived=None, sweep=sweep, branches=None, gates=None))
    plan = StudyPlan(study, tmp_path, ())
    swept = [run for run in plan.all_runs() if run.swept is not None]
    assert [(run.variant.name, run.swept) for run in swept] == [("own", 0.25), ("own", 0.5), ("own", 1.0)]
    assert [plan.is_settled(run) for run in plan.plan()] == [True, False]


def test_keys_tell_what_decides_a_result(tmp_path: Path) -> None:
    runner = StudyPlan(read_study(write_whole(tmp_path)), tmp_path, ())
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


@pytest.mark.night
@pytest.mark.parametrize("kills", [2, 20])
def test_a_study_killed_at_random_points_comes_to_the_same_results(tmp_path: Path, kills: int) -> None:
    runs = {"pool": {"expert-layout": "samoe", "num-expert-banks": 2}}
    study = write_whole(tmp_path, sweep=None, gates=None, runs=runs, baseline="pool")
    code = "import sys; from megatron_samoe.cli.study import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(study), "--full-priority", "--jobs", "2", "--save-interval", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, "--output-dir", str(whole)], check=True, capture_output=True)
    draw = random.Random(0)
    for number in range(kills):
        with subprocess.Popen(
            [*command, "--output-dir", str(broken)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as process:
            time.sleep(draw.uniform(2, 12))
            process.send_signal((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3])
            process.wait(timeout=60)
    subprocess.run([*command, "--output-dir", str(broken)], check=True, capture_output=True)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, broken))
    for found in (first, second):
        for comparison in (found, *found["others"]):
            for variant in comparison["variants"]:
                for measured in ("directories", "tokens_per_s", "peak_memory_bytes"):
                    del variant[measured]
        del found["commands"]
    assert first == second


@pytest.mark.night
def test_a_study_that_is_held_holds_its_run_until_it_may_go_on(tmp_path: Path) -> None:
    """Ctrl-Z reaches the study alone, whose runs have sessions of their own."""
    study = write_study(tmp_path, runs={"only": {"train-iters": 400}}, derived=None, baseline=None, seeds=[1])
    metrics = tmp_path / "runs/only/seed-1/metrics.jsonl"
    code = "import sys; from megatron_samoe.cli.study import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]
    with subprocess.Popen(command) as process:
        for _ in range(1200):
            if metrics.is_file() and metrics.stat().st_size:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTSTP)
        time.sleep(1)
        held = metrics.stat().st_size
        time.sleep(2)
        assert metrics.stat().st_size == held and process.poll() is None
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=240) == 0
    assert metrics.stat().st_size > held


def test_what_another_program_makes_is_left_to_it(tmp_path: Path) -> None:
    """A run's folder is its claim; a branch claims its trunk as well, as long as that has to be trained for it."""
    study = read_study(write_whole(tmp_path, sweep=None, derived=None, gates=None))
    runner = StudyRunner(StudyPlan(study, tmp_path / "runs", ()))
    branch, *others = [run for run in runner.plan.all_runs() if run.length is not None]
    trunk = runner.plan.trunk_of(branch)

    def claimed() -> list[Path]:
        """Folders in the order in which a program takes runs if none of them ends."""
        taken: list[Path] = []
        runner._started = lambda run, command: taken.append(run.directory)  # type: ignore
        while runner._start_next():
            pass
        for making in list(runner.active.values()):
            runner._close(making)
        return taken

    every = claimed()
    assert every == [branch.directory, *(run.directory for run in others)], "trunks go on when their branches are done"
    for folder in (branch.directory, trunk.directory):  # the branch would have to train its trunk
        with folder_lock(folder):
            assert claimed() == every[1:]
    commands = runner._commands(branch)
    assert str(trunk.directory) in next(commands), "its trunk comes first"
    with pytest.raises(FolderInUseError), folder_lock(trunk.directory):
        pass


def test_a_part_is_some_runs_and_all_that_they_need(tmp_path: Path) -> None:
    study = read_study(write_whole(tmp_path, seeds=[1, 2], gates=None))
    plan = StudyPlan(study, tmp_path / "runs", ())
    runs = {plan.name_of(run): run for run in plan.all_runs()}
    swept = [name for name, run in runs.items() if run.swept is not None]
    assert swept == ["pool/lr-0.001/seed-1", "pool/lr-0.004/seed-1", "pool/lr-0.016/seed-1"]
    needed = [plan.name_of(run) for run in plan.chosen(["one-bank/seed-2"])]
    assert needed == [*swept, "pool/steps-5/seed-2", "pool/seed-2", "one-bank/seed-2"]
    assert [plan.name_of(run) for run in plan.chosen(["own/steps-5/seed-1"])] == ["own/steps-5/seed-1"]
    assert plan.chosen(None) == plan.all_runs()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shard", "3/2"], "--shard = '3/2': must be a part and the number of parts"),
        (["--shard", "all"], "--shard = 'all': must be a part and the number of parts"),
        (["--shard", "1/2", "--run", "own-experts/seed-1"], "--shard = '1/2': excludes --run"),
        (["--run", "own-expert/seed-1"], "names no run of the study; --dry-run shows them. Did you mean 'own-experts/seed-1'?"),
    ],
)  # fmt: skip
def test_a_wrong_part_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([str(write_study(tmp_path)), "--output-dir", str(tmp_path / "runs"), *words]) == 2
    assert said in capfd.readouterr().err


def test_parts_are_all_runs_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [str(write_study(tmp_path)), "--output-dir", str(tmp_path / "runs"), "--dry-run"]
    shown = []
    for part in ([], ["--shard", "1/3"], ["--shard", "2/3"], ["--shard", "3/3"]):
        assert main([*command, *part]) == 0
        shown.append([line.split()[2] for line in capfd.readouterr().out.splitlines()])
    whole, first, second, third = shown
    assert len(whole) == 6 and set(whole) == {*first, *second, *third}
    assert first == ["own-experts/seed-1", "own-experts/seed-2"] and second == ["one-pool/seed-1", "one-pool/seed-2"]
    assert third == [name for name in whole if "pool" in name], "what is edited is made first"


@pytest.mark.night
def test_two_programs_share_a_study(tmp_path: Path) -> None:
    """Each with one run at a time: the second does not wait for what the first makes."""
    study = write_study(tmp_path, seeds=[1, 2], derived=None)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**OPTIONS, "train_iters": 30}))
    code = "import sys; from megatron_samoe.cli.study import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(study), "--output-dir", str(tmp_path / "runs"), "--full-priority"]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [program.communicate(timeout=240)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], said
    made = [text.count(": validation loss") for text in said]
    assert sum(made) == 4 and min(made) >= 1, said


def write_kept(folder: Path, config: PretrainConfig) -> str:
    """Writes the file that says that a run is finished, and returns its key."""
    key = results_store.run_key(config)
    content = {"key": key, "config": asdict(config), "vocab_size": 256, "checkpoint_bytes": 0}
    (folder / RUN_FILE).write_text(json.dumps(content))
    return key


def test_a_store_keeps_losses_whole_and_lists_of_experts_short(tmp_path: Path) -> None:
    run = tmp_path / "run"
    row = {
        "iteration": 5,
        "lm_loss": 3.14159265358979,
        "validation_loss": 3.0,
        "expert_load": [[0.123456789, 7], [0.5, 0.25]],
    }
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
