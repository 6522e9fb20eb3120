"""Bad input ends in one paragraph that names what is wrong and what is allowed, and costs nothing that was there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, write_checkpoint
from tests.harness.program import PRETRAIN, Sabotage, arguments, call, contents, iterations, start, write_corpus
from tests.harness.tables import table
from tests.unit.convert.memory_source import MemorySource

pytestmark = pytest.mark.distributed
#: Ranks, options, and what the paragraph says.
REFUSED: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = table(__file__)


@pytest.fixture(scope="module")
def _trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    start(arguments(data_path=corpus, run_dir=folder / "run", save_interval=3), folder / "out").succeed()
    return folder / "run"


@pytest.fixture
def trained(_trained: Path, tmp_path: Path) -> Iterator[Path]:
    """Yields a run folder with checkpoints after 3 and 6 steps; whatever the test does, these must survive it."""
    copy = tmp_path / "trained"
    shutil.copytree(_trained, copy)
    yield copy
    before, after = contents(_trained / "checkpoints"), contents(copy / "checkpoints")
    assert {name: after.get(name) for name in before} == before


def refused(tmp_path: Path, num_ranks: int = 1, **options: Any) -> str:
    """Returns the paragraph with which the program refuses a command line."""
    if num_ranks > 1:
        return start(arguments(**options), tmp_path / "out", num_ranks=num_ranks).fail()
    done = call(PRETRAIN, *arguments(**options))
    assert done.returncode > 0 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of others: what Megatron saves, which looks alike from outside, a file of weights, and a text."""
    (tmp_path / "megatron/iter_0000100/mp_rank_00").mkdir(parents=True)
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text("100")
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "text").write_text("neither protobuf nor JSON")
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_a_command_line_that_is_refused_costs_nothing(case: str, corpus: Path, trained: Path, folder: Path) -> None:
    """`tests/unit/config/refusals.yaml` lists what configurations are refused for; these cases show that nothing is lost then."""
    num_ranks, options, named = REFUSED[case]
    places = {"corpus": corpus, "data": corpus.parent, "folder": folder}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in options.items()}
    paragraph = refused(folder, num_ranks, **{"data_path": corpus, "run_dir": trained, "train_iters": 9, **given})
    assert all(part.format(**places) in paragraph for part in named), paragraph
    assert (folder / "text").read_text() == "neither protobuf nor JSON"


def with_a_foreign_token(prefix: Path) -> None:
    """Adds one id beyond the vocabulary, in the last document: it is found before the first step."""
    builder = IndexedDatasetBuilder(f"{prefix}2.bin", np.uint16)
    builder.add_index(str(prefix))
    builder.add_item(np.array([4999]))
    builder.end_document()
    builder.finalize(f"{prefix}2.idx")
    for suffix in (".bin", ".idx"):
        os.replace(f"{prefix}2{suffix}", f"{prefix}{suffix}")


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "foreign token": (with_a_foreign_token, ("token id 4999", "vocabulary of 257")),
    "no documents": (lambda p: write_corpus(p, 0, 1), ("0 sequences", "train split")),
    "no tokens": (lambda p: write_corpus(p, 30, 0), ("0 tokens, fewer than one sample", "train split")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_dataset(kind: str, trained: Path, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "data" / "victim")
    damage, named = DAMAGES[kind]
    damage(prefix)
    paragraph = refused(tmp_path, data_path=prefix, run_dir=trained, train_iters=9)
    assert all(part in paragraph for part in (str(prefix), *named)), paragraph


def test_checkpoint_with_weights_that_no_rank_has(corpus: Path, _trained: Path, tmp_path: Path) -> None:
    whole = CheckpointReader(_trained / "checkpoints/iter_0000006")
    weights = {name: whole.read(name) for name in whole.tensors} | {"layers.0.moe.gate.bias": torch.zeros(4)}
    written = write_checkpoint(tmp_path / "more", 6, MemorySource(weights, whole.config, whole.train_state))
    paragraph = refused(
        tmp_path, 2, data_path=corpus, load=tmp_path / "more", train_iters=9, pipeline_model_parallel_size=2
    )
    assert "does not have: layers.0.moe.gate.bias." in paragraph and written.name in paragraph


def test_truncated_checkpoint(corpus: Path, _trained: Path, tmp_path: Path) -> None:
    """An older whole checkpoint is taken and that is said; what was asked for by number is not replaced by another."""
    shutil.copytree(_trained, tmp_path / "run")
    os.truncate(tmp_path / "run/checkpoints/iter_0000006/__0_0.distcp", 3000)
    damaged = contents(tmp_path / "run/checkpoints")
    told = f"{tmp_path / 'run/checkpoints/iter_0000006'} is damaged: __0_0.distcp differs from what was written."
    options = {"data_path": corpus, "run_dir": tmp_path / "run", "train_iters": 9}
    assert told in refused(tmp_path, 2, **options, ckpt_step=6)
    assert contents(tmp_path / "run/checkpoints") == damaged
    output = start(arguments(**options), tmp_path / "out", num_ranks=2).succeed()
    assert f"{told} It is passed over; loading iteration 3." in output
    assert iterations(tmp_path / "run/checkpoints")[-1] == 9


def test_loss_that_is_no_number(corpus: Path, trained: Path, tmp_path: Path) -> None:
    options = {"lr": 1e30, "clip_grad": 0, "train_iters": 30, "run_dir": trained}
    paragraph = refused(tmp_path, 2, data_path=corpus, expert_model_parallel_size=2, **options)
    newest = f"newest complete checkpoint is {trained}/checkpoints/iter_0000006."
    assert all(part in paragraph for part in ("Iteration 8", "loss nan", "layer 0", "rank 0", newest)), paragraph
    assert iterations(trained / "checkpoints") == [3, 6]
    healthy = arguments(data_path=corpus, load=trained / "checkpoints", train_iters=7)
    assert "loaded" in start(healthy, tmp_path / "out").succeed()


def test_misspelt_flag(corpus: Path, tmp_path: Path) -> None:
    """One of the ranks says it."""
    run = start(arguments(data_path=corpus) + ["--trian-iters", "4"], tmp_path / "out", num_ranks=2)
    assert set(run.wait()) == {2}
    assert run.output().count("--trian-iters is not known. Did you mean '--train-iters'?") == 1
    assert "Traceback" not in run.output()


def test_checkpoint_that_cannot_be_written_whole(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """The system refuses to let a file grow, as a quota or a full disk does."""
    options = {"data_path": corpus, "train_iters": 9, "save_interval": 1, "expert_model_parallel_size": 2}
    args = arguments(**options, run_dir=trained)
    paragraph = start(args, tmp_path / "out", 2, Sabotage(file_limit_bytes=20_000)).fail()
    for part in ("cannot write", ".iter_0000007.unfinished", "Earlier checkpoints are as they were"):
        assert part in paragraph
    assert iterations(trained / "checkpoints") == [3, 6]
    shutil.copytree(trained, tmp_path / "more room")
    start(arguments(**options, run_dir=tmp_path / "more room"), tmp_path / "out", 2).succeed()
    assert {p.name for p in (tmp_path / "more room/checkpoints").iterdir()} == {
        "latest_checkpointed_iteration.txt",
        *(f"iter_{i:07d}" for i in (3, 6, 7, 8, 9)),
    }
