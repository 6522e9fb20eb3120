"""What a newcomer meets: Ctrl-C, runs that are moved, files that are there already, a model that is not kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_samoe.cli import preprocess as command
from megatron_samoe.cli import train_tokenizer
from megatron_samoe.cli.command import module_of
from tests.harness.pairs import first_by_day
from tests.harness.program import REPOSITORY, arguments, call, start

pytestmark = pytest.mark.distributed

TEXT = "\n".join(f"Emma was number {n} of the handsome and clever ones, and rich as {n * 7}." for n in range(400))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first") / "emma.txt"
    path.write_text(TEXT)
    return path


def tokenizer_words(text: Path, prefix: Path) -> list[str]:
    return ["--type", "byte-bpe", "--input", str(text), "--vocab-size", "300", "--output-prefix", str(prefix)]


def dataset_words(text: Path, tokenizer: Path, prefix: Path) -> list[str]:
    return (
        f"--input {text} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}.json "
        f"--append-eod --workers 1 --executor inline --output-prefix {prefix}"
    ).split()


def succeed(command: str, *words: object) -> str:
    """Returns what a command prints, which succeeds."""
    done = call(module_of(command), *map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout


def generated(folder: Path, *words: object) -> str:
    return succeed("generate", "--load", folder, *words)


@pytest.mark.night
def test_a_run_can_be_moved_and_keeps_its_tokenizer(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with relative paths in one folder; used from another one, without the tokenizer's file."""
    home, away = tmp_path / "home", tmp_path / "away" / "renamed"
    home.mkdir()
    monkeypatch.chdir(home)
    assert train_tokenizer.main(tokenizer_words(text, Path("tok"))) == 0
    assert command.main(dataset_words(text, Path("tok"), Path("data"))) == 0
    words = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "tok.json"}
    args = arguments(data_path="data_text_document", run_dir="run", **words, train_iters=2, eval_iters=0)
    start(args, tmp_path / "out", cwd=home).succeed()
    iteration = home / "run/checkpoints/iter_0000002"
    assert (iteration / "tokenizer/tokenizer_model.json").read_bytes() == (home / "tok.json").read_bytes()
    (home / "tok.json").rename(tmp_path / "another.json")
    away.parent.mkdir()
    shutil.move(home / "run", away)
    greedy = ("--prompt", "Emma was", "--max-new-tokens", "4", "--temperature", "0", "--num-threads", "1")
    there = generated(away, *greedy)
    assert there == generated(away, *greedy, "--tokenizer-model", tmp_path / "another.json")
    # It goes on from there, with the options that it was trained with.
    places = {"data_path": str(home / "data_text_document"), "run_dir": str(away)}
    onward = arguments(model=False, **places, use_checkpoint_args=True, train_iters=3, eval_iters=0)
    start(onward, tmp_path / "out", cwd=tmp_path).succeed()
    assert (away / "checkpoints/iter_0000003/tokenizer/tokenizer_model.json").exists()
    # Conversions and edits carry it on.
    succeed("edit", "fold", "--load-dir", away, "--save-dir", tmp_path / "folded")
    generated(tmp_path / "folded", *greedy)
    succeed("convert", "--load-dir", away, "--to", "hf", "--save-dir", tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").exists()
    # A checkpoint without it says what to do.
    shutil.rmtree(away / "checkpoints/iter_0000003/tokenizer")
    lost = call(module_of("generate"), "--load", str(away / "checkpoints/iter_0000003"), *greedy)
    assert lost.returncode != 0 and "tokenizer/tokenizer_model.json is missing" in lost.stderr


def test_what_is_there_is_not_replaced_unasked(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer, data = tmp_path / "tok", tmp_path / "data"
    assert train_tokenizer.main(tokenizer_words(text, tokenizer)) == 0
    assert command.main(dataset_words(text, tokenizer, data)) == 0
    for main, words in (
        (train_tokenizer.main, tokenizer_words(text, tokenizer)),
        (command.main, dataset_words(text, tokenizer, data)),
    ):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert main(words) == 1
        assert "exists. Give --overwrite to replace it" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
        assert main([*words, "--overwrite"]) == 0


MODULES = [f"-m megatron_samoe.cli.{command}" for command in ("pretrain", "generate", "convert")]


@pytest.mark.parametrize("words", first_by_day([*MODULES, "tools/generate.py", "tools/evaluate.py"], 4))
def test_ctrl_c_is_one_line_from_the_first_on(words: str) -> None:
    """While torch is imported, which takes seconds."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *words.split(), "--help"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "megatron_samoe.start" in line:  # that is loaded; the program is next
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    left = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    assert process.wait(30) == -signal.SIGINT
    assert left == ["interrupted"]


def test_spinning_is_set_before_torch_is_loaded() -> None:
    """What torch's libraries read is set before torch is loaded, unless somebody chose."""
    code = "import sys; sys.argv = ['-m']; import megatron_samoe, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    imported = "import megatron_samoe, sys; print('torch' in sys.modules, sys.excepthook is sys.__excepthook__)"
    for program, environment, expected in (
        (code, plain, "3000"),
        (code, {**plain, "OMP_WAIT_POLICY": "active"}, "None"),
        (imported, plain, "False True"),  # a library that is imported leaves the process alone
    ):
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.stdout.strip() == expected


def test_an_idle_pipeline_is_remarked_upon(tmp_path: Path) -> None:
    dense = {"expert_layout": "dense", "num_experts": None, "num_expert_banks": None}
    sizes = {"num_layers": 4, "pipeline_model_parallel_size": 4, "micro_batch_size": 8, "num_threads": None}
    model = arguments(mock_data=True, **dense, **sizes)
    assert "warning: ranks stand idle for " in succeed("plan", "--world-size", 4, *model)
    trained = start([*model, "--train-iters", "1", "--eval-iters", "0"], tmp_path, num_ranks=4).succeed()
    assert "the pipeline is idle for 75% of a step" in trained
