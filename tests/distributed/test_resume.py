"""A run that was killed, however often and wherever, ends as the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_samoe.evaluation.run_summary import read_run
from tests.harness.pairs import first_by_day
from tests.harness.program import (
    NOISE,
    Sabotage,
    arguments,
    assert_same_checkpoint,
    contents,
    iterations,
    losses,
    records,
    start,
    write_corpus,
)

pytestmark = pytest.mark.distributed

#: Ranks, number of kills, iterations of the run.
KILLS = [(2, 2, 10), (2, 4, 20), (1, 6, 30)]


def noisy(corpus: Path, run_dir: Path, num_ranks: int = 1, **options: object) -> list[str]:
    """Returns the command line of a SaMoE run with dropout and jitter, its experts spread over the ranks."""
    return arguments(data_path=corpus, run_dir=run_dir, expert_model_parallel_size=num_ranks, **{**NOISE, **options})


def assert_same_run(run: Path, expected: Path) -> None:
    """Asserts that two runs recorded the same steps and ended in the same checkpoint."""
    assert records(run / "metrics.jsonl") == records(expected / "metrics.jsonl")
    last = iterations(expected / "checkpoints")[-1]
    assert_same_checkpoint(run / "checkpoints" / f"iter_{last:07d}", expected / "checkpoints" / f"iter_{last:07d}")


@pytest.mark.parametrize(("num_ranks", "num_kills", "num_iterations"), first_by_day(KILLS))
def test_run_killed_at_random_points_ends_as_the_run_that_was_not(
    num_ranks: int, num_kills: int, num_iterations: int, corpus: Path, tmp_path: Path
) -> None:
    options = {"train_iters": num_iterations, "save_interval": num_ranks, "keep_last": 2}
    options["async_save"] = num_ranks == 2 or None
    start(noisy(corpus, tmp_path / "whole", num_ranks, **options), tmp_path / "out", num_ranks).succeed()
    draw = random.Random(num_ranks)
    at = 0
    for kill in range(num_kills):
        run = start(noisy(corpus, tmp_path / "killed", num_ranks, **options), tmp_path / "out", num_ranks)
        run.wait_for_step(at + draw.randint(1, 2))
        time.sleep(draw.uniform(0.0, 0.06))
        number, rank = (signal.SIGTERM, signal.SIGKILL)[kill % 2], draw.randrange(num_ranks)
        run.signal(number, rank)
        statuses = run.wait(30)  # the other rank must notice by itself
        if number == signal.SIGTERM:
            assert set(statuses) == {0}, run.output()
            assert f"exiting after iteration {run.reached()}: signal {signal.SIGTERM:d} received" in run.output()
        else:
            assert statuses[rank] == -signal.SIGKILL and 0 not in statuses, (statuses, run.output())
        at = iterations(tmp_path / "killed/checkpoints")[-1] if (tmp_path / "killed/checkpoints").exists() else 0
    assert 0 < at < num_iterations
    start(noisy(corpus, tmp_path / "killed", num_ranks, **options), tmp_path / "out", num_ranks).succeed()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("async_save", "step"),
    first_by_day([(True, 2), (True, 1), (False, 1)]),
    ids=["background, every other", "background", "waiting"],
)
def test_kill_at_any_file_operation_of_saving_loses_nothing(
    async_save: bool, step: int, corpus: Path, tmp_path: Path
) -> None:
    """The process dies before its n-th change to the checkpoint folder, for every n of a save with retention."""
    options = {"train_iters": 3, "save_interval": 1, "keep_last": 1, "eval_iters": 0, "async_save": async_save or None}
    start(noisy(corpus, tmp_path / "begun", exit_interval=1, **options), tmp_path / "out").succeed()
    start(noisy(corpus, tmp_path / "whole", **options), tmp_path / "out").succeed()
    victims: list[Path] = []
    for event in range(1, 40, step):
        folder = tmp_path / f"killed-{event}"
        shutil.copytree(tmp_path / "begun", folder)
        sabotage = Sabotage(at_file_event=event, in_folder=str(folder / "checkpoints"))
        run = start(noisy(corpus, folder, exit_interval=2, **options), folder, sabotage=sabotage)
        if run.wait() == (0,):
            break
        assert run.wait() == (-signal.SIGKILL,), run.output()
        assert iterations(folder / "checkpoints"), f"no checkpoint is left after a kill at file operation {event}"
        victims.append(folder)
    assert len(victims) * step >= 10, "a save with retention changes the folder more often than this"
    for folder in victims[::4]:
        output = start(noisy(corpus, folder, **options), folder).succeed()
        assert "loaded" in output
        assert_same_run(folder, tmp_path / "whole")
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {
            "iter_0000003",
            "latest_checkpointed_iteration.txt",
        }


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the run folder of six steps with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    start(noisy(corpus, folder / "run", save_interval=2), folder / "out").succeed()
    return folder / "run"


def test_checkpoint_args_replace_the_model_options(corpus: Path, trained: Path, tmp_path: Path) -> None:
    given = {"load": trained / "checkpoints", "use_checkpoint_args": True, "exit_on_missing_checkpoint": True}
    args = arguments(model=False, data_path=corpus, **given, train_iters=7, metrics_file=tmp_path / "metrics.jsonl")
    output = start(args, tmp_path / "out").succeed()
    assert "15,528 parameters" in output and "loaded" in output
    assert [r["iteration"] for r in records(tmp_path / "metrics.jsonl")] == [7]
    assert "hidden_size is 16 there and 32 here" in start([*args, "--hidden-size", "32"], tmp_path / "out").fail()


def test_pretrained_checkpoint_is_where_a_run_starts_and_not_where_it_starts_again(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    given = {"data_path": corpus, "model": False, "use_checkpoint_args": True, "train_iters": 4}
    args = arguments(**given, pretrained_checkpoint=trained / "checkpoints", run_dir=tmp_path / "run", exit_interval=2)
    first = start(args, tmp_path / "out").succeed()
    assert f"loaded {trained / 'checkpoints/iter_0000006'} (weights only)" in first
    second = start(args, tmp_path / "out").succeed()
    assert f"loaded {tmp_path / 'run/checkpoints/iter_0000002'}\n" in second
    places = {"load": trained / "checkpoints", "save": tmp_path / "tuned", "metrics_file": tmp_path / "m"}
    start(arguments(**given, **places, finetune=True), tmp_path / "out").succeed()
    assert records(tmp_path / "run/metrics.jsonl") == records(tmp_path / "m")
    none = arguments(data_path=corpus, pretrained_checkpoint=tmp_path / "absent", run_dir=tmp_path / "other")
    assert start(none, tmp_path / "out").fail() == f"--pretrained-checkpoint {tmp_path / 'absent'} has no checkpoint."
    assert not (tmp_path / "other").exists()


def test_finetune_that_begins_again_is_warned_of(corpus: Path, trained: Path, tmp_path: Path) -> None:
    places = {"load": trained / "checkpoints", "run_dir": tmp_path / "run"}
    args = arguments(data_path=corpus, **places, finetune=True, train_iters=1, eval_iters=0)
    assert "--finetune starts at" not in start(args, tmp_path / "out").succeed()
    assert "has iteration 1, and will replace its checkpoints" in start(args, tmp_path / "out").succeed()


def test_what_changes_in_a_run_is_remarked_upon(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """And without it nothing is said. Cosine from 1e-3: four of eight steps are half of the way, four of six two thirds."""
    rate = ("iteration 5 is 5.000e-04; the run in", "gone on at 2.500e-04", "(--train-iters 6 there, 8 here)")
    batch = ("4 steps took 32 samples in the run so far; from here on a step takes 4",)
    other = write_corpus(tmp_path / "other" / "corpus")
    common = {"data_path": corpus, "load": trained / "checkpoints", "ckpt_step": 4, "eval_iters": 0, "exit_interval": 5}
    for options, remarks in (
        ({"train_iters": 8}, rate),
        ({"global_batch_size": 4}, batch),
        ({"data_path": other}, ("--data-path differ",)),
    ):
        output = start(arguments(**{**common, **options}), tmp_path / "out").succeed()
        assert all(remark in output for remark in remarks), output
    output = start(arguments(**common), tmp_path / "out").succeed()
    assert not any(words in output for words in ("learning rate of iteration", "samples in the run so far", "differ"))


def test_no_load_optim_goes_on_with_fresh_moments(corpus: Path, trained: Path, tmp_path: Path) -> None:
    common = {"data_path": corpus, "load": trained / "checkpoints", "ckpt_step": 4, "lr_decay_iters": 6, **NOISE}
    for name, options in {"with": {}, "without": {"no_load_optim": True}}.items():
        metrics = tmp_path / f"{name}.jsonl"
        start(arguments(**common, **options, metrics_file=metrics), tmp_path / "out").succeed()
    full, fresh, original = (
        losses(p) for p in (tmp_path / "with.jsonl", tmp_path / "without.jsonl", trained / "metrics.jsonl")
    )
    assert full == original[4:]
    assert fresh[0] == full[0] and fresh[1] != full[1]  # the first loss comes before the first update


def test_another_seed_is_refused_unless_told(corpus: Path, trained: Path, tmp_path: Path) -> None:
    options = {"data_path": corpus, "load": trained / "checkpoints", "train_iters": 8, "seed": 77}
    paragraph = start(arguments(**options), tmp_path / "out").fail()
    assert "--seed 77" not in paragraph.split("this one from")[0]
    assert "--no-load-rng to continue with --seed 77" in paragraph
    assert "loaded" in start(arguments(**options, no_load_rng=True), tmp_path / "out").succeed()


def test_ckpt_step_goes_back_and_trains_the_same_again(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    output = start(noisy(corpus, tmp_path / "run", save_interval=2, ckpt_step=2), tmp_path / "out").succeed()
    assert "iter_0000002" in output
    assert_same_run(tmp_path / "run", trained)
    missing = start(noisy(corpus, tmp_path / "run", ckpt_step=5), tmp_path / "out").fail()
    assert "--ckpt-step 5" in missing and "[2, 4, 6]" in missing


def test_a_finished_run_started_again_changes_nothing(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    output = start(noisy(corpus, tmp_path / "run", save_interval=2), tmp_path / "out").succeed()
    assert "the run is at iteration 6, and --train-iters is 6: nothing to train" in output
    assert_same_run(tmp_path / "run", trained)


def test_evaluating_an_earlier_checkpoint_keeps_what_was_recorded(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    evaluate = noisy(corpus, tmp_path / "run", ckpt_step=2, skip_train=True)
    start(evaluate, tmp_path / "out").succeed()
    before, after = records(trained / "metrics.jsonl"), records(tmp_path / "run/metrics.jsonl")
    assert after[:-1] == before and after[-1]["iteration"] == 2
    assert read_run(tmp_path / "run").validation["validation_loss"] == before[-1]["validation_loss"]
    start([*evaluate, "--finetune"], tmp_path / "out").succeed()
    assert records(tmp_path / "run/metrics.jsonl")[:-1] == after
    assert contents(tmp_path / "run/tensorboard") == contents(trained / "tensorboard")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_skip_train_evaluates_what_is_loaded(num_ranks: int, corpus: Path, trained: Path, tmp_path: Path) -> None:
    last = records(trained / "metrics.jsonl")[-1]
    given = {"load": trained / "checkpoints", "metrics_file": tmp_path / "m.jsonl", "skip_train": True}
    evaluate = arguments(data_path=corpus, **given, expert_model_parallel_size=num_ranks)
    output = start(evaluate, tmp_path / "out", num_ranks).succeed()
    evaluated = records(tmp_path / "m.jsonl")
    assert [record["iteration"] for record in evaluated] == [last["iteration"]]
    assert evaluated[0]["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert f"validation loss at iteration {last['iteration']}" in output
