"""The forms that data sets are published in, brought to the plain fields that prompts are written with.

A layout is a list of forms: the authors' own, the Hugging Face Hub's, the flattened one of older evaluation harnesses.
A form is known by the fields of a row, and its function makes one or more plain rows of it, or None where it is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_samoe.errors import DataError

Row = Mapping[str, Any]
Rows = list[Row]
#: Makes a row of one form plain.
Plain = Callable[[Row], "Row | Rows | None"]


def plain_rows(rows: Iterable[tuple[str, Row]], layout: str) -> Iterator[tuple[str, Row]]:
    """Yields (place, plain row) for rows of a layout.

    Raises:
        DataError: a row has none of the known forms.
    """
    for where, row in rows:
        try:
            found = _plain(row, LAYOUTS[layout]) if layout else [row]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{where} is damaged as {layout}: {type(error).__name__} {error}.") from None
        if found is None:
            allowed = f" It must have {FORMS[layout]}." if layout in FORMS else ""
            raise DataError(
                f"{where} is no row of {layout}: it has the fields {', '.join(map(str, row)) or 'none'}.{allowed}"
            )
        for number, plain in enumerate(found):
            yield (where if len(found) == 1 else f"{where}#{number}"), plain


def _plain(row: Row, forms: Iterable[tuple[str, Plain]]) -> Rows | None:
    """Returns the plain rows of the first form that a row has; None where it has none."""
    for fields, plain in forms:
        found = plain(row) if _has(row, fields) else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return None


def _has(row: Row, fields: str) -> bool:
    return all(name in row for name in fields.split())


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


def _labelled(row: Row, field: str = "label", names: Sequence[str] = ()) -> Row:
    """A row that is plain but for how the label is written."""
    return {**row, "label": _index(row[field], names)}


def _ranked(name: str, question: object, row: Row, choices: object, gold: str = "label") -> Row:
    """A question with choices, and the field that has the right one's index."""
    return {name: question, "choices": choices, "gold": _index(row[gold])}


def _flattened(row: Row, name: str, prefix: str = "", suffix: str = "") -> Row:
    """The form of older harnesses, whose query may be in a prompt's words."""
    return _ranked(name, row["query"].removeprefix(prefix).removesuffix(suffix), row, row["choices"], "gold")


def _copa(row: Row) -> Row:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]
    # The connector takes the place of the premise's full stop.
    return {**_ranked("premise", row["premise"].strip()[:-1], row, choices), "connector": connector}


def _multirc_hub(row: Row) -> Row:
    return {**_labelled(row), "question_id": f"{row['idx']['paragraph']}-{row['idx']['question']}"}


def _multirc(row: Row) -> Rows:
    return [
        {
            "paragraph": row["passage"]["text"],
            "question": question["question"],
            "answer": answer["text"],
            "question_id": f"{row['idx']}-{question['idx']}",
            "label": _index(answer["label"]),
        }
        for question in row["passage"]["questions"]
        for answer in question["answers"]
    ]


#: Spaces that the Winograd schemas' word-by-word form has beside punctuation. As in lm-evaluation-harness, so that figures
#: compare, quotation marks lose the spaces on both their sides, although one belongs there.
_SPACES = ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"'))


def _wsc(row: Row) -> Row | None:
    spans = row.get("target", row)
    if not _has(spans, "span1_text span2_text span2_index"):
        return None
    text, pronoun = row["text"], spans["span2_text"]
    before = " ".join(text.split()[: spans["span2_index"]])
    passage = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1 :]}"
    for old, new in _SPACES:
        passage = passage.replace(old, new)
    passage = re.sub(r" (['.,])", r"\1", passage)
    return {"passage": passage, "pronoun": pronoun, "noun": spans["span1_text"], "label": _index(row["label"])}


def _wic(row: Row) -> Row:
    # The word as it stands in the first sentence, which may be inflected.
    word = row["sentence1"][row["start1"] : row["end1"]] if _has(row, "start1 end1") else row["word"]
    return {**_labelled(row), "word": word}


def _lambada(row: Row) -> Row | None:
    context, _, target = row["text"].rstrip("\r\n").rpartition(" ")
    return {"context": context, "target": target} if context and target else None


def _science(row: Row) -> Row:
    """ARC and OpenBookQA."""
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
    return {"question": question, "choices": texts, "gold": labels.index(key)}


def _hellaswag_text(text: str) -> str:
    """Without the marks that WikiHow's articles left."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(row: Row) -> Row:
    context = _hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _ranked("context", context, row, [_hellaswag_text(ending) for ending in row["endings"]])


def _winogrande_flattened(row: Row) -> Row:
    contexts = row["context_options"]
    return {**_ranked("contexts", contexts, row, contexts, "gold"), "target": row["continuation"]}


def _winogrande(row: Row) -> Row:
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no _")
    options = [row["option1"], row["option2"]]
    gold = _index(row["answer"])
    return {
        "contexts": [before + option for option in options],
        "target": after.strip(),
        "choices": options,
        "gold": gold - 1 if isinstance(gold, int) else gold,
    }


def _race(article: str, question: str, options: Iterable[str], answer: str) -> Row:
    return {"article": article, "question": question, "choices": list(options), "gold": list("ABCD").index(answer)}


def _race_article(row: Row) -> Rows:
    keys = zip(row["questions"], row["options"], row["answers"], strict=True)
    return [_race(row["article"], *key) for key in keys]


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


def _triviaqa(
    question: str, answer: object, names: Sequence[str] = ("value", "aliases", "normalized_aliases")
) -> Row | None:
    if isinstance(answer, Mapping):
        answers = [answer[names[0]], *answer.get(names[1], ()), *answer.get(names[2], ())]
    else:
        answers = _texts(answer)
    # "Question: ...?" is written by the prompt; most questions bring a mark of their own.
    plain = question.strip().removesuffix("?").rstrip()
    return {"question": plain, "answers": list(dict.fromkeys(answers))} if answers else None


_DESCRIPTION = re.compile(r'\(description\s+(?:"((?:[^"\\]|\\.)*)"|([^()"]+?))\s*\)')


def _webqs_hub(row: Row, name: str) -> Row | None:
    answers = _texts(row[name])
    return {"question": row["question"], "answers": answers} if answers else None


def _webqs(row: Row) -> Row | None:
    found = [a.replace('\\"', '"') if a else b for a, b in _DESCRIPTION.findall(row["targetValue"])]
    return {"question": row["utterance"], "answers": found} if found else None


#: Forms by layout: the fields that one is known by, and what makes it plain.
LAYOUTS: dict[str, tuple[tuple[str, Plain], ...]] = {
    "boolq": (
        ("question passage label", _labelled),
        ("question passage answer", partial(_labelled, field="answer")),  # the authors' has "answer": true
    ),
    "cb": (("premise hypothesis label", partial(_labelled, names=("entailment", "contradiction", "neutral"))),),
    "copa": (("premise choice1 choice2 question label", _copa),),
    "hellaswag": (
        ("query choices gold", partial(_flattened, name="context")),
        ("activity_label ctx_a ctx_b endings label", _hellaswag),
    ),
    "lambada": (
        ("context continuation", lambda row: {"context": row["context"], "target": row["continuation"].strip()}),
        ("text", _lambada),
    ),
    "multirc": (("paragraph question answer label idx", _multirc_hub), ("passage", _multirc)),
    "piqa": (
        ("query choices gold", partial(_flattened, name="goal", prefix="Question: ", suffix="\n")),
        ("goal sol1 sol2 label", lambda row: _ranked("goal", row["goal"], row, [row["sol1"], row["sol2"]])),
    ),
    "race": (
        ("article questions", _race_article),
        (
            "article question options answer",
            lambda row: _race(row["article"], row["question"], row["options"], row["answer"]),
        ),
    ),
    "rte": (("premise hypothesis label", partial(_labelled, names=("entailment", "not_entailment"))),),
    "science": (
        ("query choices gold", partial(_flattened, name="question", prefix="Question: ")),
        ("answerKey", _science),
    ),
    "triviaqa": (
        (
            "Question Answer",
            lambda row: _triviaqa(row["Question"], row["Answer"], ("Value", "Aliases", "NormalizedAliases")),
        ),
        ("question answer", lambda row: _triviaqa(row["question"], row["answer"])),
        ("question answers", lambda row: _triviaqa(row["question"], row["answers"])),
        ("question target", lambda row: _triviaqa(row["question"], row["target"])),
    ),
    "webqs": (
        *((f"question {name}", partial(_webqs_hub, name=name)) for name in ("answers", "answer", "target")),
        ("utterance targetValue", _webqs),
    ),
    "wic": (("sentence1 sentence2 label", _wic),),
    "winogrande": (
        ("context_options continuation gold", _winogrande_flattened),
        ("sentence option1 option2 answer", _winogrande),
    ),
    "wsc": (("text label", _wsc),),
}
