"""Tasks: every published form of the data becomes the right items, and what does not fit is refused in one paragraph."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.evaluation.zero_shot.build_items import load_items
from megatron_samoe.evaluation.zero_shot.data_files import NoDataError, find_data, read_documents
from megatron_samoe.evaluation.zero_shot.layouts import plain_rows
from megatron_samoe.evaluation.zero_shot.prepare import prepare
from megatron_samoe.evaluation.zero_shot.task import TASK_DIR, Task, fill, load_task, parse_task, task_names
from tests.harness.tables import table
from tests.unit.evaluation.zero_shot_data import FORMS, Form, lines, write

TABLE = table(__file__, tuples=False)
ISSUE_TASKS = (
    "lambada piqa boolq race_h triviaqa webqs hellaswag winogrande arc_easy arc_challenge openbookqa multirc copa cb rte "
    "wic wsc"
)
PLAIN: dict[str, Any] = {
    "name": "mine", "description": "made up", "files": ["mine"], "kind": "multiple_choice", "context": "{q}",
    "choices": ["no", "yes"], "gold": "label", "metrics": ["acc"],
}  # fmt: skip


def plain(**changes: Any) -> Task:
    content = {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}
    return parse_task(content, "mine.yaml")


def test_every_task_that_is_promised_is_there_and_has_a_tested_form() -> None:
    assert set(task_names()) == set(ISSUE_TASKS.split()) == {form.task for form in FORMS}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.task}-{next(iter(form.files)).replace('/', '.')}")
def test_forms(form: Form, tmp_path: Path) -> None:
    items = load_items(load_task(form.task), write(form, tmp_path))
    assert len(items) == form.num_items
    assert (items[0].contexts, items[0].continuations, items[0].gold) == (form.contexts, form.continuations, form.gold)


@pytest.mark.parametrize(
    "task, answers", [("triviaqa", ("Jane Austen", "Austen", "austen")), ("webqs", ("Italy", 'the "boot"'))]
)
def test_answers(task: str, answers: tuple[str, ...], tmp_path: Path) -> None:
    for number, form in enumerate(form for form in FORMS if form.task == task):
        (item,) = load_items(load_task(task), write(form, tmp_path / str(number)))
        assert item.answers == answers


def test_questions_are_told_apart_in_both_forms_of_multirc(tmp_path: Path) -> None:
    nested = next(form for form in FORMS if form.task == "multirc" and form.num_items == 3)
    items = load_items(load_task("multirc"), write(nested, tmp_path))
    assert [item.group for item in items] == ["4-7", "4-7", "4-8"] and [item.gold for item in items] == [1, 0, 0]
    # A limit keeps whole questions.
    assert len(load_items(load_task("multirc"), tmp_path, limit=1)) == 2


def test_packed_files_and_parquet_give_the_same_items(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"q": f"row {n}", "label": n % 2} for n in range(5)]
    content = lines(*rows).encode()
    packed = {
        "a/mine.jsonl": content,
        "b/mine.jsonl.xz": lzma.compress(content),
        "c/mine.jsonl.gz": gzip.compress(content),
        "d/mine.json": json.dumps({"data": rows}).encode(),
        "e/mine/part.jsonl": content,
    }
    for name, data in packed.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "f").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f/mine.parquet")
    found = [load_items(plain(), folder) for folder in sorted(tmp_path.iterdir())]
    assert len(found) == 6
    for items in found:
        assert [(i.contexts, i.gold) for i in items] == [((f"row {n}",), n % 2) for n in range(5)]
        assert items[1].name.endswith(":2")


def test_a_task_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**PLAIN, "context": "{{{q}}}", "delimiter": "|"}))
    (tmp_path / "mine.jsonl").write_text(lines({"q": "{left} alone", "label": 1}))
    ((task, items),) = prepare(str(tmp_path / "mine.yaml"), tmp_path).tasks
    assert task.name == "mine"
    # A field's own braces are text, and doubled braces of the template are single ones.
    assert items[0].pairs == (("{{left} alone}", "|no"), ("{{left} alone}", "|yes"))


@pytest.mark.parametrize("missing", ["name", "description", "files", "kind", "context", "metrics", "choices", "gold"])
def test_missing_fields_are_named(missing: str) -> None:
    with pytest.raises(DataError, match=rf"mine.yaml.*({missing} = None: missing|needs the fields {missing})"):
        plain(**{missing: None})


@pytest.mark.parametrize("changes, message", TABLE["tasks"])
def test_wrong_task_files(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plain(**changes)


@pytest.mark.parametrize("content", ["- a\n", "name: [", "", "\x00"])
def test_files_that_are_no_task(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(DataError, match=r"t\.yaml"):
        load_task(str(tmp_path / "t.yaml"))


@pytest.mark.parametrize("row, message", TABLE["rows"])
def test_rows_that_do_not_fit(row: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(lines({"q": "fine", "label": 0}, row))
    with pytest.raises(DataError, match=message):
        load_items(plain(), tmp_path)


@pytest.mark.parametrize("task, content, message", TABLE["damaged"])
def test_damaged_data_of_known_forms(task: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / f"{load_task(task).files[0]}.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_items(load_task(task), tmp_path)


@pytest.mark.parametrize("content, message", [("7", "holds no rows, but int"), ("[" * 100_000, "is no JSON")])
def test_documents_that_are_no_rows(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "boolq_val.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_items(load_task("boolq"), tmp_path)


@pytest.mark.parametrize("pattern", ["", "/absolute"])
def test_patterns_that_name_nothing_below_a_folder(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names nothing below a folder"):
        find_data(plain(files=(pattern,)), tmp_path)


def test_labels_beside_the_data_must_be_as_many(tmp_path: Path) -> None:
    form = next(form for form in FORMS if "piqa/valid-labels.lst" in form.files)
    write(form, tmp_path)
    for labels, message in (("", "has only 0 labels"), ("1\n0\n", "has 1 rows, valid-labels.lst beside it 2 labels")):
        (tmp_path / "piqa/valid-labels.lst").write_text(labels)
        with pytest.raises(DataError, match=message):
            load_items(load_task("piqa"), tmp_path)


def test_packed_data_that_is_cut_short(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl.xz").write_bytes(lzma.compress(b"{}" * 1000)[:-20])
    with pytest.raises(DataError, match=r"mine\.jsonl\.xz cannot be read"):
        load_items(plain(), tmp_path)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoDataError, match=r"no data in .*looked for boolq_val\{.*--hub would fetch it"):
        find_data(load_task("boolq"), tmp_path)
    (tmp_path / "evals").mkdir()
    with pytest.raises(NoDataError, match=r"is no folder\. Did you mean 'evals'\?"):
        find_data(load_task("boolq"), tmp_path / "eval")
    with pytest.raises(NoDataError, match="has the data of no task"):
        prepare("all", tmp_path)
    with pytest.raises(NoDataError, match="must name the folder of task boolq"):
        prepare("boolq", None)
    with pytest.raises(NoDataError, match="--tasks all needs a folder of data"):
        prepare("all", None)


def test_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    for form in FORMS:
        if form.task in ("cb", "copa"):
            write(form, tmp_path)
    questions = prepare("all", tmp_path)
    assert [task.name for task, _ in questions.tasks] == ["cb", "copa"] and len(questions.skipped) == len(
        task_names()
    ) - 2
    assert [task.name for task, _ in prepare("copa, cb", tmp_path).tasks] == ["copa", "cb"]
    with pytest.raises(ConfigError, match=r"--tasks = 'copaa'.*Did you mean 'copa'\?"):
        prepare("copaa", tmp_path)
    with pytest.raises(ConfigError, match="names copa more than once"):
        prepare("copa,copa", tmp_path)
    with pytest.raises(ConfigError, match="not there"):
        prepare("absent.yaml", tmp_path)
    with pytest.raises(NoDataError, match="Task rte has no data"):
        prepare("copa,rte", tmp_path)
    with pytest.raises(ConfigError, match="--limit = 0"):
        prepare("copa", tmp_path, limit=0)


def test_texts_to_measure(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zwei Wörter")
    (tmp_path / "b.jsonl").write_text(lines({"text": "one"}, {"text": ""}, {"text": "two\n\nthree "}))
    (document,) = read_documents(tmp_path / "a.txt")
    assert (document.num_bytes, document.num_words) == (12, 2)
    documents = read_documents(tmp_path / "b.jsonl")
    assert [d.text for d in documents] == ["one", "two\n\nthree "] and documents[1].num_words == 3
    (tmp_path / "c.jsonl").write_text(lines({"txt": "one"}))
    for name, message in (("c.jsonl", 'has no field "text"; it has txt'), ("absent.txt", "is not there")):
        with pytest.raises(DataError, match=message):
            read_documents(tmp_path / name)
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        read_documents(tmp_path / "d.txt")


def test_templates_put_fields_in_as_they_are() -> None:
    assert fill("{a}{{b}} {n}", {"a": "{n}\\1", "n": 4}, "x") == "{n}\\1{b} 4"


def test_the_shipped_files_say_nothing_that_a_default_says() -> None:
    for path in TASK_DIR.glob("*.yaml"):
        task = load_task(path.stem)
        assert task.name == path.stem and task.description and task.hub
        assert path.read_text().startswith("# "), "each names its source"


def test_a_task_that_cannot_be_read_does_not_end_the_others(tmp_path: Path) -> None:
    for form in FORMS:
        if form.task in ("cb", "copa"):
            write(form, tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [")
    questions = prepare(f"copa,{bad}", tmp_path)
    assert [task.name for task, _ in questions.tasks] == ["copa"]
    assert len(questions.failed) == 1 and "bad.yaml is not a readable task file" in questions.failed[0]
    with pytest.raises(DataError, match="not a readable task file"):
        prepare(str(bad), tmp_path)


@pytest.mark.parametrize(
    ("layout", "row", "answers"),
    [
        ("triviaqa", {"question": "Who?", "answer": "Emma"}, ["Emma"]),
        ("triviaqa", {"question": "Who?", "answers": ["Emma", "E."]}, ["Emma", "E."]),
        ("webqs", {"question": "Who?", "answer": ["Emma"]}, ["Emma"]),
        ("webqs", {"question": "Who?", "target": "Emma"}, ["Emma"]),
    ],
)
def test_mirrors_of_question_sets_are_read(layout: str, row: dict[str, Any], answers: list[str]) -> None:
    assert [plain["answers"] for _, plain in plain_rows([("a:1", row)], layout)] == [answers]
    with pytest.raises(DataError, match=r"It must have .*the authors' files"):
        list(plain_rows([("a:1", {"question": "Who?", "solution": 3})], layout))
