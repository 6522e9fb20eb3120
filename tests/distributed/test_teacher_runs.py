"""Runs of the program with a teacher: resumed in another layout before it leaves, logged, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.program import NOISE, arguments, records, start

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


def test_a_student_resumes_in_another_layout(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "moe_input_jitter_eps": 0.0}
    start(taught(corpus, tmp_path / "run", teacher, exit_interval=2, **options), tmp_path / "out").succeed()
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    start(taught(corpus, tmp_path / "run", teacher, **split, **options), tmp_path / "out", 2).succeed()
    output = start(taught(corpus, tmp_path / "whole", teacher, **options), tmp_path / "out").succeed()
    assert output.count("the student continues without its teacher") == 1 and output.count(" | kl loss: ") == UNTIL
    for mine, whole in zip(*(records(tmp_path / n / "metrics.jsonl") for n in ("run", "whole")), strict=True):
        for key in ("lm_loss", "kl_loss", "grad_norm", "validation_loss"):
            assert mine.get(key) == (pytest.approx(whole[key], rel=1e-4) if key in whole else None), (key, mine)


def test_a_teacher_that_is_missing_or_that_no_rank_can_hold_is_refused(
    corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    """The first before any data is read, the second though the job could train without."""
    words = taught(tmp_path / "no_data", tmp_path / "run", tmp_path / "nowhere")
    assert f"--teacher {tmp_path / 'nowhere'} has no checkpoint" in start(words, tmp_path / "out").fail()
    words = taught(corpus, tmp_path / "run", teacher, expert_model_parallel_size=4, elastic=True)
    assert "the teacher's --num-experts = 2" in start(words, tmp_path / "out", 4).fail()
