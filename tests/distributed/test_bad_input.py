"""Bad input ends in one paragraph that names what is wrong and what is allowed, and costs nothing that was there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, write_checkpoint
from tests.harness.program import PRETRAIN, arguments, call, contents, iterations, start, write_corpus
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


@pytest.mark.parametrize(
    ("documents", "tokens", "said"), [(0, 1, "0 sequences"), (30, 0, "0 tokens, fewer than one sample")]
)
def test_a_dataset_without_tokens(documents: int, tokens: int, said: str, trained: Path, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "data/empty", documents, tokens)
    paragraph = refused(tmp_path, data_path=prefix, run_dir=trained, train_iters=9)
    assert all(part in paragraph for part in (str(prefix), said, "train split")), paragraph


def test_checkpoint_with_weights_that_no_rank_has(corpus: Path, _trained: Path, tmp_path: Path) -> None:
    whole = CheckpointReader(_trained / "checkpoints/iter_0000006")
    weights = {name: whole.read(name) for name in whole.tensors} | {"layers.0.moe.gate.bias": torch.zeros(4)}
    written = write_checkpoint(tmp_path / "more", 6, MemorySource(weights, whole.config, whole.train_state))
    paragraph = refused(
        tmp_path, 2, data_path=corpus, load=tmp_path / "more", train_iters=9, pipeline_model_parallel_size=2
    )
    assert "does not have: layers.0.moe.gate.bias." in paragraph and written.name in paragraph


def test_loss_that_is_no_number(corpus: Path, trained: Path, tmp_path: Path) -> None:
    options = {"lr": 1e30, "clip_grad": 0, "train_iters": 30, "run_dir": trained}
    paragraph = refused(tmp_path, 2, data_path=corpus, expert_model_parallel_size=2, **options)
    newest = f"newest complete checkpoint is {trained}/checkpoints/iter_0000006."
    assert all(part in paragraph for part in ("Iteration 8", "loss nan", "layer 0", "rank 0", newest)), paragraph
    assert iterations(trained / "checkpoints") == [3, 6]
    healthy = arguments(data_path=corpus, load=trained / "checkpoints", train_iters=7)
    assert "loaded" in start(healthy, tmp_path / "out").succeed()
