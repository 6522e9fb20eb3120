"""Made-up rows in the forms that data sets are published in, with what must become of them: `zero_shot_data.yaml`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Form:
    """A file, or several, of a task, and its first item.

    Attributes:
        files: content by name below the data folder.
    """

    task: str
    files: dict[str, str]
    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    gold: int = 0
    num_items: int = 1
    answers: tuple[str, ...] = ()


def lines(*rows: dict[str, Any]) -> str:
    """Returns JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(form: Form, folder: Path) -> Path:
    """Writes a form's files below a folder and returns the folder."""
    for name, content in form.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def _text(name: str, content: Any) -> str:
    """Returns a file's text: a text itself, rows of JSON, or one document."""
    if isinstance(content, str):
        return content
    return lines(*content) if name.endswith(".jsonl") else json.dumps(content)


def _form(task: str, files: dict[str, Any], **expected: Any) -> Form:
    texts = {name: _text(name, content) for name, content in files.items()}
    return Form(task, texts, **{key: tuple(x) if isinstance(x, list) else x for key, x in expected.items()})


_TASKS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
FORMS = [_form(task, **form, **item) for task, item in _TASKS.items() for form in item.pop("forms")]
