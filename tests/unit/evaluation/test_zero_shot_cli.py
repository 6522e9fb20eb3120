"""The evaluate program as a user drives it: tables, JSON, samples, checkpoints, comparisons, refusals, several ranks."""

from __future__ import annotations

import json
import logging
import math
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.cli.evaluate import DATA_VARIABLE, main
from megatron_samoe.language_model import load
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.setup import build_setup, initial_state
from tests.harness.program import call, start
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.evaluation.test_zero_shot_tasks import PLAIN
from tests.unit.evaluation.zero_shot_data import FORMS, lines, write

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
TABLE = table(__file__, tuples=False)
PROGRAM = "megatron_samoe.cli.evaluate"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders, of three checkpoints and of one."""
    folders = tmp_path_factory.mktemp("samoe"), tmp_path_factory.mktemp("moe")
    data = {"mock_data": True, "tokenizer_type": "ByteTokenizer", "seq_length": 32}
    for folder, iterations, seed in zip(folders, ((10, 20, 30), (30,)), (1, 2), strict=True):
        config = tiny_config("samoe" if seed == 1 else "moe", save=str(folder), **data)
        setup, generator = build_setup(config, 257, single_process_state()), torch.Generator().manual_seed(seed)
        for iteration in iterations:
            with torch.no_grad():
                for parameter in setup.model.global_parameters().values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            save_run(setup, replace(initial_state(setup), iteration=iteration))
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one form of each task, and more rows of BoolQ."""
    folder = tmp_path_factory.mktemp("data")
    for form in {form.task: form for form in FORMS}.values():
        write(form, folder)
    rows = [{"question": f"is {n} odd", "passage": "p" * (n % 7), "label": n % 3 > 0} for n in range(30)]
    (folder / "boolq_val.jsonl").write_text(lines(*rows))
    return folder


@pytest.fixture(autouse=True)
def _no_data_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


def run(*words: object, status: int = 0) -> str:
    """Returns what the program says, or what it refuses with."""
    logging.getLogger("megatron_samoe").handlers.clear()  # else it would write to an earlier test's output
    done = call(PROGRAM, *map(str, words))
    assert done.returncode == status, done
    assert not status or (done.stderr.startswith("error: ") and "Traceback" not in done.stderr)
    return done.stderr if status else done.stdout


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every question to a network an error."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.mark.usefixtures("offline")
def test_all_tasks_of_a_folder(checkpoints: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    out = run("--load", checkpoints[0], "--data-dir", data, "--json", tmp_path / "r.json", "--samples", tmp_path / "s")
    (found,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert found["name"] == "iter_0000030" and found["seq_length"] == 32 and found["limit"] is None
    results = {result["task"]: result for result in found["results"]}
    assert len(results) == 18 and results["boolq"]["items"] == 30 and results["boolq"]["best_constant"] == 2 / 3
    assert set(results["multirc"]["metrics"]) == {"acc_per_answer", "em", "f1a", "yes_share"}
    assert "were cut from the left" in out
    lines_of = [line for line in out.splitlines() if line.startswith("boolq ")]
    assert len(lines_of) == 1, "each figure is printed once"
    samples = [json.loads(line) for line in (tmp_path / "s/boolq.jsonl").read_text().splitlines()]
    assert len(samples) == 30
    accuracy = sum(sample["acc"] for sample in samples) / 30
    assert accuracy == pytest.approx(results["boolq"]["metrics"]["acc"]["value"])
    for sample in samples:
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        assert sample["acc"] == (scores.index(max(scores)) == sample["target"])
    again = load(checkpoints[0]).evaluate("boolq,multirc", data)
    assert [(r.task, r.num_items) for r in again] == [("boolq", 30), ("multirc", results["multirc"]["items"])]
    assert again[0].metrics["acc"].value == pytest.approx(accuracy)


def test_a_group_and_examples_before_each_item(checkpoints: tuple[Path, Path], tmp_path: Path, data: Path) -> None:
    data_files = {"data_files": {"test": "boolq_val.jsonl"}}
    fields = {"doc_to_text": "{{question}}", "doc_to_target": "{{label|int}}", "target_delimiter": " "}
    task = {**PLAIN, "task": "odd", "dataset_kwargs": data_files, **fields}
    group = {"group": "both", "task": [task, {**task, "task": "odder"}], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    words = ("--load", checkpoints[0], "--data-dir", data, "--tasks", tmp_path / "both.yaml", "--limit", 8)
    samples = ("--samples", tmp_path / "s")
    run(*words, "--json", tmp_path / "r.json", "--num-fewshot", 2, *samples)
    results = {r["task"]: r for r in json.loads((tmp_path / "r.json").read_text())["runs"][0]["results"]}
    assert {name: r["items"] for name, r in results.items()} == {"both::odd": 8, "both::odder": 8, "both": 16}
    values = [results[name]["metrics"]["acc"]["value"] for name in ("both::odd", "both::odder", "both")]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    (first, *_) = [json.loads(line) for line in (tmp_path / "s/both::odd.jsonl").read_text().splitlines()]
    assert first["arguments"][0][0].count("is ") == 3


def test_checkpoints_and_comparison(checkpoints: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    one = ("--data-dir", data, "--tasks", "boolq,multirc", "--json", tmp_path / "r.json")
    accuracies = []
    for step in (20, 30):
        run("--load", checkpoints[0], "--ckpt-step", step, *one)
        (found,) = json.loads((tmp_path / "r.json").read_text())["runs"]
        accuracies.append(found["results"][0]["metrics"]["acc"]["value"])
    out = run("--load", checkpoints[0], "--checkpoints", "LAST:2", "--compare-with", checkpoints[1], *one)
    content = json.loads((tmp_path / "r.json").read_text())
    assert [r["name"] for r in content["runs"]] == ["iter_0000020", "iter_0000030", "iter_0000030"]
    over = next(v for v in content["variation"] if v["task"] == "boolq")
    assert over["values"] == accuracies and over["mean"] == pytest.approx(sum(accuracies) / 2)
    assert over["sd"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / math.sqrt(2))
    assert over["stderr"] == pytest.approx(math.sqrt(accuracies[1] * (1 - accuracies[1]) / 29))
    comparison = content["comparison"][0]
    other = content["runs"][2]["results"][0]["metrics"]["acc"]["value"]
    assert (comparison["first"], comparison["second"]) == (accuracies[1], other)
    b, c = comparison["mcnemar"]["only_first"], comparison["mcnemar"]["only_second"]
    assert c - b == round(30 * (other - accuracies[1]))
    for words in ("over 2 checkpoints (iter_0000020, iter_0000030)", "std. error of one", "p McNemar", "p bootstrap"):
        assert words in out


def test_results_are_kept_when_a_later_checkpoint_fails(
    checkpoints: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints[0], tmp_path / "damaged")
    (weights,) = (tmp_path / "damaged/iter_0000030").glob("*.distcp")
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ("--load", tmp_path / "damaged", "--checkpoints", "LAST:2", "--data-dir", data, "--tasks", "boolq")
    run(*words, "--json", tmp_path / "r.json", "--samples", tmp_path / "samples", status=1)
    assert [r["name"] for r in json.loads((tmp_path / "r.json").read_text())["runs"]] == ["iter_0000020"]
    assert (tmp_path / "samples/0_iter_0000020/boolq.jsonl").is_file()


def test_perplexity_alone_needs_no_data_folder(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words to measure, several")
    words = ("--load", checkpoints[1], "--corpus", tmp_path / "a.txt")
    found = []
    for batch_size in (1, 3):
        out = run(*words, "--batch-size", batch_size, "--json", tmp_path / "r.json")
        content = json.loads((tmp_path / "r.json").read_text())
        found.append(content["runs"][0]["results"][0]["metrics"]["byte_perplexity"]["value"])
        assert "corpus:a.txt" in out and "word_perplexity" in out
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_without_the_harness(checkpoints: tuple[Path, Path], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    error = run("--load", checkpoints[0], "--data-dir", data, "--tasks", "boolq", status=1)
    assert "needs the package lm_eval: " in error and "[eval]" in error and error.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), TABLE["flags"])
def test_misspelt_and_former_flags_are_told(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert message in capsys.readouterr().err


def test_list_tasks() -> None:
    assert len(run("--list-tasks").splitlines()) == 18 + 1


@pytest.mark.parametrize("words, message", TABLE["refused"])
def test_refusals(words: list[str], message: str, checkpoints: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    names: dict[str, Any] = {"LOAD": checkpoints[0], "DATA": data, "TEXT": tmp_path / "text.txt"}
    status = 1 if "absent" in message or "[10" in message or "only 3" in message else 2
    assert message in run(*(names.get(word, word) for word in words), status=status)


@pytest.mark.night
@pytest.mark.distributed
def test_two_stages(checkpoints: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    """The program over two pipeline stages, over several checkpoints, says what one process says."""
    tasks = "--tasks boolq,lambada_openai,triviaqa --checkpoints LAST:2".split()
    words = ["--load", str(checkpoints[0]), "--data-dir", str(data), *tasks, "--json"]
    expected = run(*words, tmp_path / "1.json")
    stages = [*words, str(tmp_path / "2.json"), "--pipeline-model-parallel-size", "2"]
    said = start(stages, tmp_path / "out", 2, program=PROGRAM).succeed(120)
    assert said.count(expected) == 1 and said.count("boolq ") == expected.count("boolq "), "the first rank alone speaks"
    one, two = (json.loads((tmp_path / name).read_text())["runs"] for name in ("1.json", "2.json"))
    for a, b in zip(one, two, strict=True):
        for first, second in zip(a["results"], b["results"], strict=True):
            for name, metric in first["metrics"].items():
                assert second["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-5)
