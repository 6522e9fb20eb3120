"""A student that a teacher teaches trains alike in every layout, whatever model the teacher is and wherever it was saved; runs of the
program with a teacher are resumed in another layout before it leaves, logged, and refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.setup import build_setup, initial_state
from tests.harness.layout_training import LAYOUTS, assert_same, layout_config, train_each
from tests.harness.pairs import first_by_day
from tests.harness.program import NOISE, PRETRAIN, arguments, call, records, start
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed

TABLE = table(__file__)

#: Ranks, layout and model that a teacher was saved with. None has the layers or the width of a student.
TEACHERS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = TABLE["teachers"]
#: The teacher of each student.
STUDENTS: dict[str, str] = TABLE["students"]
LAYOUTS_OF_STUDENTS: tuple[str, ...] = TABLE["layouts of students"]


def save_teacher(config: PretrainConfig) -> None:
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    save_run(setup, initial_state(setup))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the teachers' checkpoints; their weights are so large that they predict something."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, (world_size, sizes, options) in TEACHERS.items():
        config = tiny_config(**options, init_method_std=0.2, save=str(folder / name))
        run_ranks(save_teacher, world_size, with_layout(config, **sizes))
    return folder


def student_config(layout: str, student: str, folder: Path) -> PretrainConfig:
    taught = {"teacher": str(folder / STUDENTS[student]), "teacher_temperature": 1.5, "teacher_weight": 2.0}
    return with_options(layout_config(layout, student), **taught)


@cache
def results_of(layout: str, folder: Path) -> dict[str, dict[str, Any]]:
    configs = [student_config(layout, student, folder) for student in STUDENTS]
    results = run_ranks(train_each, LAYOUTS[layout][0], configs, torch.float32, 2, timeout_s=300)[0]
    return dict(zip(STUDENTS, results, strict=True))


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("layout", first_by_day(LAYOUTS_OF_STUDENTS))
def test_layout_equals_one_process(layout: str, student: str, teachers: Path) -> None:
    expected = results_of("one process", teachers)[student]
    assert min(expected["divergences"]) > 0.05, "the teacher and the student differ"
    assert_same(results_of(layout, teachers)[student], expected, rtol=1e-5)


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


def test_what_cannot_teach_is_told_in_one_paragraph(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    def refused(num_ranks: int = 1, **options: object) -> str:
        given = {"teacher": teacher, **options}
        words = taught(given.pop("corpus", corpus), tmp_path / "run", **given)  # type: ignore[arg-type]
        return call(PRETRAIN, *words).stderr if num_ranks == 1 else start(words, tmp_path / "out", num_ranks).fail()

    assert "it must be the student's, which has 300" in refused(vocab_size=300)
    assert "the teacher's --max-position-embeddings = 16" in refused(seq_length=32)
    nowhere = {"teacher": tmp_path / "nowhere", "corpus": tmp_path / "no_data"}
    assert f"--teacher {tmp_path / 'nowhere'} has no checkpoint" in refused(**nowhere), "before any data is read"
    assert "the teacher's --num-experts = 2" in refused(4, expert_model_parallel_size=4, elastic=True)
    assert "holds no checkpoint of this program, but corpus.bin" in refused(teacher=corpus.parent)
    assert "at most --train-iters 8" in refused(teacher_until=9)
    assert "needs --teacher" in refused(teacher=None)
    assert "the teacher's --num-experts = 2" in refused(4, expert_model_parallel_size=4)
