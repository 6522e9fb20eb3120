"""Tasks as lm-evaluation-harness asks them, from files in every form that data sets are published in."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.evaluation.zero_shot.data_files import NoDataError, find_data, read_documents, read_rows
from megatron_samoe.evaluation.zero_shot.published_forms import hub_rows
from megatron_samoe.evaluation.zero_shot.tasks import TaskLoader, local_data
from tests.harness.tables import table
from tests.unit.evaluation.zero_shot_data import FORMS, Form, lines, write

TABLE = table(__file__, tuples=False)
#: A task of one's own.
PLAIN = TABLE["plain"]


@pytest.fixture(scope="module", autouse=True)
def _harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")


def asked(names: str, folder: Path | None) -> list[list[Any]]:
    """Returns the requests of each item of the one task that a name means."""
    (task,) = TaskLoader(folder).load(names)
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1)
    task.build_all_requests()
    items: dict[int, list[Any]] = {}
    for request in task.instances:
        items.setdefault(request.doc_id, []).append(request)
    return [sorted(requests, key=lambda request: request.idx) for _, requests in sorted(items.items())]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.task}-{next(iter(form.files)).replace('/', '.')}")
def test_forms(form: Form, tmp_path: Path) -> None:
    items = asked(form.task, write(form, tmp_path))
    assert len(items) == form.num_items
    contexts = form.contexts * (len(items[0]) if len(form.contexts) == 1 else 1)
    assert tuple(request.args[0] for request in items[0]) == contexts
    if form.continuations:
        assert {request.args[1] for request in items[0]} == set(form.continuations)
        assert len(items[0]) == max(len(form.continuations), len(form.contexts))
    (task,) = TaskLoader(tmp_path).load(form.task)
    doc = items[0][0].doc
    if form.answers:
        assert tuple(doc["answers"] if form.task == "webqs" else doc["answer"]["aliases"]) == form.answers
    elif task.OUTPUT_TYPE == "multiple_choice":
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        assert gold == (form.gold if isinstance(gold, int) else form.continuations[form.gold].removeprefix(" "))


def test_every_task_has_a_tested_form() -> None:
    assert set(local_data()) == {form.task for form in FORMS}


def test_packed_files_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"q": f"row {n}", "label": n % 2} for n in range(5)]
    content = lines(*rows).encode()
    packed = {"a/mine.jsonl": content, "e/mine/part.jsonl": content, "d/mine.json": json.dumps({"data": rows}).encode()}
    packed |= {"b/mine.jsonl.xz": lzma.compress(content), "c/mine.jsonl.gz": gzip.compress(content)}
    for name, data in packed.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "f").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f/mine.parquet")
    for folder in sorted(tmp_path.iterdir()):
        found = list(read_rows(find_data("mine", ["mine"], folder)))
        assert [row for _, row in found] == rows and found[1][0].endswith(":2")


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(PLAIN))
    (tmp_path / "mine.jsonl").write_text(lines({"q": "{left} alone", "label": 1}))
    (item,) = asked(str(tmp_path / "mine.yaml"), tmp_path)
    assert [request.args for request in item] == [("{left} alone", "|no"), ("{left} alone", "|yes")]


@pytest.mark.parametrize("changes, message", TABLE["task files"])
def test_wrong_task_files(changes: Any, message: str, tmp_path: Path) -> None:
    content = changes if isinstance(changes, str) else yaml.safe_dump({**PLAIN, **changes})
    (tmp_path / "mine.yaml").write_text(content)
    (tmp_path / "mine.jsonl").write_text(lines({"q": "x", "label": 1}))
    with pytest.raises(DataError, match=message) as caught:
        TaskLoader(tmp_path).load(str(tmp_path / "mine.yaml"))
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("task, content, message", TABLE["damaged"])
def test_damaged_data(task: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / f"{local_data()[task].files[0]}.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        TaskLoader(tmp_path).load(task)


def test_labels_beside_the_data_must_be_as_many(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text(lines({"goal": "a", "sol1": "b", "sol2": "c"}) * 2)
    for labels in ("1\n", "1\n0\n1\n"):
        (tmp_path / "valid-labels.lst").write_text(labels)
        with pytest.raises(DataError, match=r"has 2 rows, valid-labels\.lst next to it [13] labels"):
            TaskLoader(tmp_path).load("piqa")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.json", b"7", "holds no rows, but int"),
        ("mine.json", b"[" * 100_000, "is no JSON"),
        ("mine.jsonl.xz", lzma.compress(b"{}" * 1000)[:-20], r"mine\.jsonl\.xz cannot be read"),
    ],
)
def test_files_that_hold_no_rows(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    for form in FORMS:
        if form.task in ("cb", "copa"):
            write(form, tmp_path)
    loader = TaskLoader(tmp_path)
    assert [task.task_name for task in loader.load("all")] == ["cb", "copa"]
    assert len(loader.skipped) == len(local_data()) - 2
    assert [task.task_name for task in loader.load("copa, cb")] == ["copa", "cb"]
    for names, message in (("copa,copa", "names copa more than once"), ("absent.yaml", "that is not there")):
        with pytest.raises(ConfigError, match=message):
            loader.load(names)
    with pytest.raises(NoDataError, match=r"Task wic has no data in .*looked for wic_val\{.*--hub would fetch it"):
        loader.load("copa,wic")
    (tmp_path / "evals").mkdir()
    with pytest.raises(NoDataError, match=r"is not a folder\. Did you mean 'evals'\?"):
        TaskLoader(tmp_path / "eval").load("boolq")
    with pytest.raises(NoDataError, match="has the data of no task"):
        TaskLoader(tmp_path / "evals").load("all")
    with pytest.raises(NoDataError, match="--tasks all needs a folder of data"):
        TaskLoader().load("all")


def test_line_feeds_before_lambadas_word_are_the_tasks() -> None:
    """The harness's template splits the Hub's text at its last space: one item of the 5,153 has a word on a line of its own."""
    rows = [
        {"context": "she saw the", "continuation": "\n\nrecorder\n"},
        {"context": "she saw the", "continuation": " recorder"},
        {"text": "she saw the \n\nrecorder\n"},
    ]
    texts = [row["text"] for row in hub_rows("lambada_openai", [("a:1", row) for row in rows], ["text"])]
    assert texts == ["she saw the \n\nrecorder", "she saw the recorder", "she saw the \n\nrecorder"]


@pytest.mark.night
def test_names_tags_and_groups_of_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads all of the harness's thousands of files."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for form in FORMS:
        if form.task in ("lambada_openai", "lambada_standard"):
            write(form, tmp_path)
    loader = TaskLoader(tmp_path)
    assert [task.task_name for task in loader.load("lambada")] == ["lambada_openai", "lambada_standard"]
    row = {"question": "What is wet?", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
    (tmp_path / "sciq.jsonl").write_text(lines({**row, "correct_answer": "d", "support": "s"}))
    # Copies of data sets of the Hub, below the folder by their names there.
    for split, answer in (("train", "2"), ("test", "7")):
        (tmp_path / f"openai/gsm8k/main/{split}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"openai/gsm8k/main/{split}.jsonl").write_text(lines({"question": "q", "answer": answer}))
    files = [{"split": split, "path": f"main/{split}.jsonl"} for split in ("train", "test")]
    card = {"configs": [{"config_name": "main", "data_files": files}]}
    (tmp_path / "openai/gsm8k/README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    sciq, gsm8k = loader.load("sciq,gsm8k")
    assert sciq.doc_to_text(sciq.eval_docs[0]).endswith("Question: What is wet?\nAnswer:")
    assert [doc["answer"] for doc in gsm8k.eval_docs] == ["7"]
    with pytest.raises(ConfigError, match=r"--tasks = 'hellaswga'.*Did you mean 'hellaswag'\?"):
        loader.load("hellaswga")
    with pytest.raises(NoDataError, match=r"Task mathqa cannot be used: .*--data-dir names a folder"):
        loader.load("mathqa")


def test_texts_to_measure(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zwei Wörter")
    (tmp_path / "b.jsonl").write_text(lines({"text": "one"}, {"text": ""}, {"text": "two\n\nthree "}))
    (document,) = read_documents(tmp_path / "a.txt")
    assert document.text == "zwei Wörter"
    assert [d.text for d in read_documents(tmp_path / "b.jsonl")] == ["one", "two\n\nthree "]
    (tmp_path / "c.jsonl").write_text(lines({"txt": "one"}))
    (tmp_path / "d.txt").write_text("")
    for name, message in TABLE["no texts"]:
        with pytest.raises(DataError, match=message):
            read_documents(tmp_path / name)


@pytest.mark.parametrize(("task", "row", "answers"), TABLE["mirrors"])
def test_mirrors_of_question_sets_are_read(task: str, row: dict[str, Any], answers: Any) -> None:
    fields = local_data()[task].fields
    assert [found[fields[1]] for found in hub_rows(task, [("a:1", row)], fields)] == [answers]
    with pytest.raises(DataError, match=f"a:1 is damaged as {task}"):
        list(hub_rows(task, [("a:1", {"question": "Who?", "solution": 3})], fields))
