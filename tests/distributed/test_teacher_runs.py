"""Runs of the program with a teacher: killed and resumed before and after it leaves, logged, and refused."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.harness.program import (
    NOISE,
    arguments,
    assert_same_checkpoint,
    iterations,
    records,
    start,
)

pytestmark = pytest.mark.distributed

UNTIL = 4


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    model = {"num_layers": 3, "hidden_size": 24, "num_experts": 2, "init_method_std": 0.2}
    run = arguments(data_path=corpus, run_dir=folder / "run", expert_model_parallel_size=2, **model)
    start(run, folder / "out", 2).succeed()
    return folder / "run"


def taught(corpus: Path, run_dir: Path, teacher: Path, **options: object) -> list[str]:
    until = {
        "teacher": teacher,
        "teacher_until": UNTIL,
        "teacher_temperature": 2.0,
        "train_iters": 8,
        "save_interval": 1,
    }
    return arguments(data_path=corpus, run_dir=run_dir, **{**NOISE, **until, **options})


@pytest.mark.night
@pytest.mark.parametrize("num_ranks", [2, 1])
def test_killed_runs_end_as_the_run_that_was_not(num_ranks: int, corpus: Path, teacher: Path, tmp_path: Path) -> None:
    """The second kill comes when the teacher has left; then its folder is gone."""
    lent, layout = tmp_path / "lent", {"pipeline_model_parallel_size": num_ranks}
    shutil.copytree(teacher, lent)
    output = start(taught(corpus, tmp_path / "whole", lent, **layout), tmp_path / "out", num_ranks).succeed()
    assert output.count("the student continues without its teacher") == 1
    assert output.count(" | kl loss: ") == UNTIL
    for reached in (2, UNTIL + 2):
        run = start(taught(corpus, tmp_path / "killed", lent, **layout), tmp_path / "out", num_ranks)
        line = f"iteration {reached:8d}/"
        assert run.wait_until(lambda run=run, line=line: line in run.output()), run.output()
        run.signal(signal.SIGKILL)
        run.wait(30)
        saved = iterations(tmp_path / "killed" / "checkpoints")[-1]
        assert (saved < UNTIL) == (reached < UNTIL) and saved < 8
    shutil.rmtree(lent)
    output = start(taught(corpus, tmp_path / "killed", lent, **layout), tmp_path / "out", num_ranks).succeed()
    assert "teaches" not in output
    whole = records(tmp_path / "whole" / "metrics.jsonl")
    assert records(tmp_path / "killed" / "metrics.jsonl") == whole
    assert ["kl_loss" in record for record in whole] == [record["iteration"] <= UNTIL for record in whole]
    last = "checkpoints/iter_0000008"
    assert_same_checkpoint(tmp_path / "killed" / last, tmp_path / "whole" / last)


def test_a_student_resumes_in_another_layout(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "moe_input_jitter_eps": 0.0}
    start(taught(corpus, tmp_path / "run", teacher, exit_interval=2, **options), tmp_path / "out").succeed()
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    start(taught(corpus, tmp_path / "run", teacher, **split, **options), tmp_path / "out", 2).succeed()
    start(taught(corpus, tmp_path / "whole", teacher, **options), tmp_path / "out").succeed()
    for mine, whole in zip(*(records(tmp_path / n / "metrics.jsonl") for n in ("run", "whole")), strict=True):
        for key in ("lm_loss", "kl_loss", "grad_norm", "validation_loss"):
            assert mine.get(key) == (pytest.approx(whole[key], rel=1e-4) if key in whole else None), (key, mine)


def test_what_cannot_teach_is_told_in_one_paragraph(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    def refused(num_ranks: int = 1, **options: object) -> str:
        given = {"teacher": teacher, **options}
        words = taught(given.pop("corpus", corpus), tmp_path / "run", **given)  # type: ignore[arg-type]
        return start(words, tmp_path / "out", num_ranks).fail()

    assert "it must be the student's, which has 300" in refused(vocab_size=300)
    assert "the teacher's --max-position-embeddings = 16" in refused(seq_length=32)
    nowhere = {"teacher": tmp_path / "nowhere", "corpus": tmp_path / "no_data"}
    assert f"--teacher {tmp_path / 'nowhere'} has no checkpoint" in refused(**nowhere), "before any data is read"
    assert "the teacher's --num-experts = 2" in refused(4, expert_model_parallel_size=4, elastic=True)
    assert "holds no checkpoint of this program, but corpus.bin" in refused(teacher=corpus.parent)
    assert "at most --train-iters 8" in refused(teacher_until=9)
    assert "needs --teacher" in refused(teacher=None)
    assert "the teacher's --num-experts = 2" in refused(4, expert_model_parallel_size=4)
