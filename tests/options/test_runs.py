"""What an option changes of a run: the steps that are logged, the checkpoints and files that are written, and who reads data."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_samoe.datasets.gpt_dataset import GPTDataset
from megatron_samoe.dist_checkpointing import saving
from megatron_samoe.training.hooks import replica_check
from tests.harness import program
from tests.harness.datasets import write_dataset
from tests.harness.tables import table
from tests.options.table import unlike


class Run:
    """What a finished run of one process shows: its log's lines of training, its checkpoints and files, what was said, and torch."""

    def __init__(self, folder: Path, said: str) -> None:
        log = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        trained = [line for line in lines if "lm_loss" in line]
        self.folder, self.said = folder, said
        self.steps, self.tokens, self.rates = (
            [line[name] for line in trained] for name in ("iteration", "consumed_tokens", "learning_rate")
        )
        self.evaluated = [line["iteration"] for line in lines if "validation_loss" in line]
        self.saved = program.iterations(folder / "checkpoints")
        self.files = " ".join(str(path.relative_to(folder)) for path in folder.rglob("*"))
        self.threads, self.is_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, padded to a multiple of 8."""
        newest = self.folder / f"checkpoints/iter_{self.saved[-1]:07d}"
        return len(program.checkpoint_tensors(newest)["embedding.word.weight"])

    @property
    def tags(self) -> str:
        """Names of what TensorBoard shows."""
        events = EventAccumulator(str(self.folder / "tensorboard"))
        events.Reload()
        return " ".join(tag for kind in ("scalars", "tensors", "histograms", "images") for tag in events.Tags()[kind])


#: Other options, and what a run shows.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = table(str(Path(__file__).with_name("runs.py")), tuples=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program.write_corpus(tmp_path_factory.mktemp("runs") / "data" / "corpus")


@pytest.fixture(autouse=True)
def process() -> Any:
    """Leaves the process as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def run(folder: Path, **options: Any) -> Run:
    """Trains in this process."""
    words = program.arguments(
        **{"run_dir": folder, "train_iters": 4, "eval_iters": 0, "eval_interval": None, **options}
    )
    ended = program.call(program.PRETRAIN, *words)
    assert ended.returncode == 0, ended.stderr
    return Run(folder, ended.stdout + ended.stderr)


@pytest.mark.parametrize("option", RUNS)
def test_a_run_shows_what_an_option_says(option: str, corpus: Path, tmp_path: Path) -> None:
    options, shows = RUNS[option]
    ended = run(tmp_path / "run", **{"data_path": corpus, **options})
    assert not unlike(ended, shows), ended.said


@pytest.mark.parametrize("option", ["tensorboard_dir", "metrics_file", "save"])
def test_files_go_where_an_option_says(option: str, corpus: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", data_path=corpus, **{option: tmp_path / "there"})
    written = [path.name for path in (tmp_path / "there").rglob("*")] if option != "metrics_file" else ["there"]
    expected = {"tensorboard_dir": "events.out", "metrics_file": "there", "save": "iter_0000004"}[option]
    assert any(name.startswith(expected) for name in written) and (tmp_path / "there").exists()


def numbered(prefix: Path, count: int = 64) -> Path:
    """Writes documents of 17 tokens, each of its own number."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    return Path(write_dataset(prefix, [np.full(17, number) for number in range(count)]))


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., object]) -> None:
    """Has each call of a function noted, with its arguments, once it is done."""
    call = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        note(*args)
        return result

    monkeypatch.setattr(owner, name, noted)


@pytest.mark.parametrize(("option", "value"), [("num_workers", 3), ("num_workers", 0)])
def test_as_many_threads_read_as_asked_for(
    option: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = set[str]()
    watch(monkeypatch, GPTDataset, "get_batch", lambda *_: readers.add(threading.current_thread().name))
    run(tmp_path / "run", data_path=numbered(tmp_path / "data/corpus"), split="1", train_iters=30, **{option: value})
    assert readers == {"MainThread"} if value == 0 else len(readers) == value


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_samples_come_in_order_or_shuffled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indices_read = list[int]()
    watch(monkeypatch, GPTDataset, "get_batch", lambda _, indices: indices_read.extend(indices))
    data = {"data_path": numbered(tmp_path / "data/corpus"), "split": "1", "num_workers": 0}
    run(tmp_path / "run", dataloader_type=kind, **data)
    assert len(set(indices_read)) == 4 * 8, "no sample twice"
    assert (indices_read == sorted(indices_read)) == (kind == "single")


@pytest.mark.parametrize("asked", [True, None])
def test_checkpoints_are_written_by_another_thread_where_asked(
    asked: bool | None, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = set[str]()
    watch(monkeypatch, saving, "write_sharded", lambda *_: writers.add(threading.current_thread().name))
    ended = run(tmp_path / "run", data_path=corpus, save_interval=2, async_save=asked)
    assert ended.saved == [2, 4] and ("MainThread" in writers) == (asked is None)


def test_copies_of_a_pool_are_compared_at_its_steps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(replica_check, "check_pool_replicas", lambda _setup, iteration: compared.append(iteration))
    replicated = {"samoe_pool_placement": "replicated", "pool_replica_check_interval": 3}
    run(tmp_path / "run", data_path=corpus, train_iters=7, **replicated)
    assert compared == [3, 6]


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_gets_its_project_and_a_name(
    library: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in hears what the libraries, which have the same calls, would be asked."""
    begun: list[tuple[str, str]] = []
    stand_in = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    stand_in.init = lambda project, name, config: begun.append((project, name))
    monkeypatch.setitem(sys.modules, library, stand_in)
    run(tmp_path / "run", data_path=corpus, exp_name="second", **{f"{library}_project": "banks"})
    assert begun == [("banks", "second")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers of 300 entries: GPT-2's two files, and a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text("the cat sat on the mat, and the hat sat on the cat. " * 50)
    words = f"--type byte-bpe --input {folder}/text.txt --vocab-size 280 --output-prefix {folder}/bpe"
    assert program.call("megatron_samoe.cli.train_tokenizer", *words.split()).returncode == 0
    return folder


@pytest.mark.parametrize("option", ["tokenizer_model", "vocab_file", "merge_file"])
def test_files_of_a_tokenizer_give_the_vocabulary(option: str, tokenizers: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizers / "bpe.json"}
    if option != "tokenizer_model":
        files = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": tokenizers / "bpe-vocab.json"}
        files["merge_file"] = tokenizers / "bpe-merges.txt"
    assert run(tmp_path / "run", mock_data=True, **files).vocabulary == 280


@pytest.mark.parametrize("asked", [True, None])
def test_files_of_data_are_mapped_unless_told(asked: bool | None, tmp_path: Path, monkeypatch: Any) -> None:
    """As the system says it while samples are read."""
    corpus = program.write_corpus(tmp_path / "data/corpus")
    maps = set[bool]()
    mapped = Path("/proc/self/maps")
    watch(monkeypatch, GPTDataset, "get_batch", lambda *_: maps.add(f"{corpus}.bin" in mapped.read_text()))
    run(tmp_path / "run", data_path=corpus, no_mmap_bin_files=asked)
    assert maps == {asked is None}
