"""The forms that data sets are published in, brought to the plain fields that prompts are written with.

Each function takes one row as it stands in a file and yields one or more plain rows. It knows the authors' own form,
the Hugging Face Hub's, and the flattened one of older evaluation harnesses, tells them apart by their fields, and
returns None for a row that is none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_samoe.errors import DataError

Row = Mapping[str, Any]
Layout = Callable[[Row], "list[Row] | None"]


def plain_rows(rows: Iterable[tuple[str, Row]], layout: str) -> Iterator[tuple[str, Row]]:
    """Yields (place, plain row) for rows of a layout.

    Raises:
        DataError: a row has none of the known forms.
    """
    for where, row in rows:
        try:
            found = LAYOUTS[layout](row) if layout else [row]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{where} is damaged as {layout}: {type(error).__name__} {error}.") from None
        if found is None:
            allowed = f" It must have {FORMS[layout]}." if layout in FORMS else ""
            raise DataError(
                f"{where} is no row of {layout}: it has the fields {', '.join(map(str, row)) or 'none'}.{allowed}"
            )
        for number, plain in enumerate(found):
            yield (where if len(found) == 1 else f"{where}#{number}"), plain


def _has(row: Row, *names: str) -> bool:
    return all(name in row for name in names)


def _index(label: object, names: Sequence[str] = ()) -> object:
    """Returns a label as an index where it can be read as one: numbers, truth values, names of the classes."""
    if isinstance(label, bool):
        return int(label)
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        if label.lower() in ("true", "false"):
            return int(label.lower() == "true")
        if re.fullmatch(r"-?\d+", label.strip()):
            return int(label)
    return label


def _labelled(*needed: str, names: Sequence[str] = ()) -> Layout:
    """Returns the layout of rows that are plain but for how the label is written."""

    def layout(row: Row) -> list[Row] | None:
        return [{**row, "label": _index(row["label"], names)}] if _has(row, *needed, "label") else None

    return layout


def _boolq(row: Row) -> list[Row] | None:
    if _has(row, "question", "passage", "label"):
        return [{**row, "label": _index(row["label"])}]
    # The authors' own form has "answer": true.
    return [{**row, "label": _index(row["answer"])}] if _has(row, "question", "passage", "answer") else None


def _copa(row: Row) -> list[Row] | None:
    if not _has(row, "premise", "choice1", "choice2", "question", "label"):
        return None
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]
    # The connector takes the place of the premise's full stop.
    premise = row["premise"].strip()[:-1]
    return [{"premise": premise, "connector": connector, "choices": choices, "gold": _index(row["label"])}]


def _multirc(row: Row) -> list[Row] | None:
    if _has(row, "paragraph", "question", "answer", "label", "idx"):
        place = row["idx"]
        return [{**row, "question_id": f"{place['paragraph']}-{place['question']}", "label": _index(row["label"])}]
    if not _has(row, "passage"):
        return None
    passage, rows = row["passage"], []
    for question in passage["questions"]:
        for answer in question["answers"]:
            rows.append(
                {
                    "paragraph": passage["text"], "question": question["question"], "answer": answer["text"],
                    "question_id": f"{row['idx']}-{question['idx']}", "label": _index(answer["label"]),
                }
            )  # fmt: skip
    return rows


#: Spaces that the Winograd schemas' word-by-word form has beside punctuation. As in lm-evaluation-harness, so that figures
#: compare, quotation marks lose the spaces on both their sides, although one belongs there.
_SPACES = ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"'))


def _wsc(row: Row) -> list[Row] | None:
    spans = row["target"] if "target" in row else row
    if not _has(row, "text", "label") or not _has(spans, "span1_text", "span2_text", "span2_index"):
        return None
    text, pronoun = row["text"], spans["span2_text"]
    before = " ".join(text.split()[: spans["span2_index"]])
    passage = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1 :]}"
    for old, new in _SPACES:
        passage = passage.replace(old, new)
    passage = re.sub(r" (['.,])", r"\1", passage)
    return [{"passage": passage, "pronoun": pronoun, "noun": spans["span1_text"], "label": _index(row["label"])}]


def _wic(row: Row) -> list[Row] | None:
    if not _has(row, "sentence1", "sentence2", "label"):
        return None
    # The word as it stands in the first sentence, which may be inflected.
    word = row["sentence1"][row["start1"] : row["end1"]] if _has(row, "start1", "end1") else row["word"]
    return [{**row, "word": word, "label": _index(row["label"])}]


def _lambada(row: Row) -> list[Row] | None:
    if _has(row, "context", "continuation"):
        return [{"context": row["context"], "target": row["continuation"].strip()}]
    if not _has(row, "text"):
        return None
    context, _, target = row["text"].rstrip("\r\n").rpartition(" ")
    return [{"context": context, "target": target}] if context and target else None


def _piqa(row: Row) -> list[Row] | None:
    if _has(row, "query", "choices", "gold"):
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        return [{"goal": goal, "choices": row["choices"], "gold": _index(row["gold"])}]
    if not _has(row, "goal", "sol1", "sol2", "label"):
        return None
    return [{"goal": row["goal"], "choices": [row["sol1"], row["sol2"]], "gold": _index(row["label"])}]


def _science(row: Row) -> list[Row] | None:
    """ARC and OpenBookQA."""
    if _has(row, "query", "choices", "gold"):
        question = row["query"].removeprefix("Question: ")
        return [{"question": question, "choices": row["choices"], "gold": _index(row["gold"])}]
    if not _has(row, "answerKey"):
        return None
    question = row["question_stem"] if "question_stem" in row else row["question"]
    choices = row["choices"] if "choices" in row else question["choices"]
    if isinstance(question, Mapping):
        question = question["stem"]
    if isinstance(choices, Mapping):  # the Hub's: one list of texts, one of labels
        texts, labels = list(choices["text"]), list(choices["label"])
    else:
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    key = row["answerKey"].strip()
    if key not in labels:
        raise ValueError(f"answerKey {key!r} is none of {labels}")
    return [{"question": question, "choices": texts, "gold": labels.index(key)}]


def _hellaswag_text(text: str) -> str:
    """Without the marks that WikiHow's articles left."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(row: Row) -> list[Row] | None:
    if _has(row, "query", "choices", "gold"):
        return [{"context": row["query"], "choices": row["choices"], "gold": _index(row["gold"])}]
    if not _has(row, "activity_label", "ctx_a", "ctx_b", "endings", "label"):
        return None
    context = _hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    choices = [_hellaswag_text(ending) for ending in row["endings"]]
    return [{"context": context, "choices": choices, "gold": _index(row["label"])}]


def _winogrande(row: Row) -> list[Row] | None:
    if _has(row, "context_options", "continuation", "gold"):
        return [{"contexts": row["context_options"], "target": row["continuation"], "gold": _index(row["gold"]),
                 "choices": row["context_options"]}]  # fmt: skip
    if not _has(row, "sentence", "option1", "option2", "answer"):
        return None
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no _")
    options = [row["option1"], row["option2"]]
    gold = _index(row["answer"])
    return [{"contexts": [before + option for option in options], "target": after.strip(), "choices": options,
             "gold": gold - 1 if isinstance(gold, int) else gold}]  # fmt: skip


def _race(row: Row) -> list[Row] | None:
    """One article with its questions (the authors'), or one question (the Hub's)."""
    if not _has(row, "article"):
        return None
    if "questions" in row:
        keys = zip(row["questions"], row["options"], row["answers"], strict=True)
    elif _has(row, "question", "options", "answer"):
        keys = iter([(row["question"], row["options"], row["answer"])])
    else:
        return None
    return [
        {"article": row["article"], "question": question, "choices": list(options), "gold": list("ABCD").index(answer)}
        for question, options, answer in keys
    ]


def _texts(answers: object) -> list[str]:
    """Returns answers that a mirror keeps as one text, or as a list of texts; none where it is neither."""
    listed = [answers] if isinstance(answers, str) else answers
    return list(listed) if isinstance(listed, list) and all(isinstance(text, str) for text in listed) else []


#: What the rows of layouts may have, for messages.
FORMS = {
    "triviaqa": "Question and Answer (the authors' files), or question and answer (with value and aliases, a text or a list "
    "of texts), answers or target",
    "webqs": "utterance and targetValue (the authors' files), or question and answers, answer or target",
}


def _triviaqa(row: Row) -> list[Row] | None:
    if _has(row, "Question", "Answer"):
        question, answer = row["Question"], row["Answer"]
        names = ("Value", "Aliases", "NormalizedAliases")
    elif _has(row, "question", "answer"):
        question, answer = row["question"], row["answer"]
        names = ("value", "aliases", "normalized_aliases")
    elif _has(row, "question", "answers") or _has(row, "question", "target"):
        question, answer, names = row["question"], row.get("answers", row.get("target")), ()
    else:
        return None
    if isinstance(answer, Mapping):
        answers = [answer[names[0]], *answer.get(names[1], ()), *answer.get(names[2], ())]
    else:
        answers = _texts(answer)
    if not answers:
        return None
    # "Question: ...?" is written by the prompt; most questions bring a mark of their own.
    return [{"question": question.strip().removesuffix("?").rstrip(), "answers": list(dict.fromkeys(answers))}]


_DESCRIPTION = re.compile(r'\(description\s+(?:"((?:[^"\\]|\\.)*)"|([^()"]+?))\s*\)')


def _webqs(row: Row) -> list[Row] | None:
    for name in ("answers", "answer", "target"):
        if _has(row, "question", name) and _texts(row[name]):
            return [{"question": row["question"], "answers": _texts(row[name])}]
    if not _has(row, "utterance", "targetValue"):
        return None
    found = [a.replace('\\"', '"') if a else b for a, b in _DESCRIPTION.findall(row["targetValue"])]
    return [{"question": row["utterance"], "answers": found}] if found else None


LAYOUTS: dict[str, Layout] = {
    "boolq": _boolq,
    "cb": _labelled("premise", "hypothesis", names=("entailment", "contradiction", "neutral")),
    "copa": _copa,
    "hellaswag": _hellaswag,
    "lambada": _lambada,
    "multirc": _multirc,
    "piqa": _piqa,
    "race": _race,
    "rte": _labelled("premise", "hypothesis", names=("entailment", "not_entailment")),
    "science": _science,
    "triviaqa": _triviaqa,
    "webqs": _webqs,
    "wic": _wic,
    "winogrande": _winogrande,
    "wsc": _wsc,
}
