"""The forms that data sets are published in, brought to the Hugging Face Hub's, for which lm-evaluation-harness's tasks are written.

Besides the Hub's own there are the authors' files and the flattened ones of older harnesses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_samoe.errors import DataError

Row = Mapping[str, Any]
Rows = list[Row]


def hub_rows(
    task: str, rows: Iterable[tuple[str, Row]], fields: Sequence[str], classes: Sequence[str] = ()
) -> Iterator[Row]:
    """Yields the rows of a task as the Hub has them, reduced to some fields where these are given.

    Args:
        rows: (position in the file, row) pairs.
        classes: names of the labels, in their order on the Hub.

    Raises:
        DataError: a row has none of the known forms, or its label is secret.
    """
    form = FORMS.get(task, lambda row: row)
    for where, row in rows:
        try:
            found = form(row)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{where} is damaged as {task}: {type(error).__name__} {error}.") from None
        for hub_row in found if isinstance(found, list) else [found]:
            lacking = [name for name in fields if name not in hub_row]
            if lacking:
                has = ", ".join(map(str, row)) or "none"
                raise DataError(f"{where} is not a row of {task}: it has the fields {has}; missing is {lacking[0]}.")
            chosen = {name: hub_row[name] for name in fields or hub_row}
            if "label" in fields:
                chosen["label"] = _index(chosen["label"], classes, where)
            yield chosen


def _index(label: object, classes: Sequence[str], where: str) -> int:
    """Returns a label as an index: numbers, truth values and names of classes are read."""
    if isinstance(label, str):
        names = list(classes) or ["false", "true"]
        label = names.index(label.lower()) if label.lower() in names else label.strip()
    try:
        index = int(label)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        index = -1
    if index < 0:
        raise DataError(
            f"{where}: label = {label!r} is not the index of a choice. Test sets whose labels are kept secret have -1."
        )
    return index


def _boolq(row: Row) -> Row:
    return row if "label" in row else {**row, "label": row["answer"]}  # the authors' has "answer": true


def _rte(row: Row) -> Row:
    """SuperGLUE's names for GLUE's fields."""
    return row if "sentence1" in row else {**row, "sentence1": row["premise"], "sentence2": row["hypothesis"]}


def _wsc(row: Row) -> Row:
    return {**row, **row["target"]} if "target" in row else row


def _multirc(row: Row) -> Row | Rows:
    if "passage" not in row:
        return row
    return [
        {
            "paragraph": row["passage"]["text"],
            "question": question["question"],
            "answer": answer["text"],
            "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
            "label": answer["label"],
        }
        for question in row["passage"]["questions"]
        for answer in question["answers"]
    ]


def _lambada(row: Row) -> Row:
    text = row["text"] if "text" in row else f"{row['context']} {row['continuation'].strip(' ')}"
    text = text.rstrip("\r\n")  # line feeds before the word are the task's
    if " " not in text.strip():
        raise ValueError("the text has one word")
    return {"text": text}


def _piqa(row: Row) -> Row:
    if "query" not in row:
        return row
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    if "query" not in row:
        return row
    activity, _, context = row["query"].partition(": ")
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": row["choices"], "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    if "context_options" in row:
        first, second = row["context_options"]
        # The blank is the whole of what comes before the continuation.
        row = {"sentence": f"_ {row['continuation']}", "option1": first, "option2": second, "answer": row["gold"] + 1}
    answer = str(row["answer"])
    if "_" not in row["sentence"] or answer not in ("1", "2"):
        raise ValueError("the sentence has no _" if answer in ("1", "2") else f"answer {answer!r} is not 1 or 2")
    return {**row, "answer": answer}


def _science(row: Row) -> Row:
    """ARC and OpenBookQA."""
    if "query" in row:
        question = row["query"].removeprefix("Question: ")
        texts = row["choices"]
        labels, key = [chr(ord("A") + n) for n in range(len(texts))], chr(ord("A") + row["gold"])
    else:
        question = row["question_stem"] if "question_stem" in row else row["question"]
        choices = row["choices"] if "choices" in row else question["choices"]
        question = question["stem"] if isinstance(question, Mapping) else question
        if isinstance(choices, Mapping):  # the Hub's: one list of texts, one of labels
            texts, labels = choices["text"], choices["label"]
        else:
            texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
        key = row["answerKey"].strip()
    if key not in labels:
        raise ValueError(f"answerKey {key!r} is none of {labels}")
    choices = {"text": list(texts), "label": list(labels)}
    return {"question": question, "question_stem": question, "choices": choices, "answerKey": key}


def _race(row: Row) -> Row | Rows:
    articles = [row]
    if "questions" in row:
        keys = zip(row["questions"], row["options"], row["answers"], strict=True)
        articles = [{"article": row["article"], "question": q, "options": o, "answer": a} for q, o, a in keys]
    for one in articles:
        "ABCD".index(one["answer"])
    return articles


def _texts(answers: object) -> list[str]:
    """Returns answers that a mirror keeps as one text or as a list of texts."""
    listed = [answers] if isinstance(answers, str) else answers
    if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"answers {answers!r} are no texts")
    return listed


def _triviaqa(row: Row) -> Row:
    answer = row.get("Answer", row.get("answer"))
    if isinstance(answer, Mapping):  # the authors', the Hub's
        aliases = _texts(list(answer.get("Aliases", answer.get("aliases"))))
    else:
        aliases = _texts(_first(row, "answer", "answers", "target"))
    return {"question": _first(row, "Question", "question"), "answer": {"aliases": aliases}}


def _first(row: Row, *names: str) -> Any:
    """Returns the first of some fields that a row has."""
    return row[next((name for name in names if name in row), names[0])]


_DESCRIPTION = re.compile(r'\(description\s+(?:"((?:[^"\\]|\\.)*)"|([^()"]+?))\s*\)')


def _webqs(row: Row) -> Row:
    if "targetValue" not in row:
        return {"question": row["question"], "answers": _texts(_first(row, "answers", "answer", "target"))}
    found = [
        quoted.replace('\\"', '"') if quoted else plain for quoted, plain in _DESCRIPTION.findall(row["targetValue"])
    ]
    return {"question": row["utterance"], "answers": _texts(found)}


#: Makes a row the Hub's, or several; tasks that are not here have one form, except for how labels are written.
FORMS: dict[str, Callable[[Row], Row | Rows]] = {
    "arc_challenge": _science,
    "arc_easy": _science,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "lambada_standard": _lambada,
    "multirc": _multirc,
    "openbookqa": _science,
    "piqa": _piqa,
    "race_h": _race,
    "rte": _rte,
    "triviaqa": _triviaqa,
    "webqs": _webqs,
    "winogrande": _winogrande,
    "wsc": _wsc,
}
