"""Made-up rows in the forms that data sets are published in, with what must become of them.

Nothing here is taken from a data set: only fields and file names are the publishers'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """A file, or several, of a task, and its first item.

    Attributes:
        files: content by name below the data folder.
    """

    task: str
    files: dict[str, str]
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    num_items: int = 1


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


_BOOLQ = ("Tea is a drink.\nQuestion: is tea wet?\nAnswer:",), (" no", " yes"), 1
_CB = ("She knew it rained.\nQuestion: It rained. True, False, or Neither?\nAnswer:",), (" True", " False", " Neither")
_COPA = ("The cup fell because",), (" it was pushed.", " it was blue.")
_MULTIRC_CONTEXT = "Ann has a cat.\nQuestion: Who has a pet?\nAnswer: Ann\nIs the answer correct?"
_WIC = (
    "Sentence 1: He runs a shop.\nSentence 2: She ran home.\nQuestion: Is the word 'runs' used in the same way in the two "
    "sentences above?\nAnswer:",
), (" no", " yes")  # fmt: skip
_WSC = (
    'Passage: Tom said"hello"to Jim, but *he* didn\'t listen.\nQuestion: In the passage above, does the pronoun "*he*" '
    'refer to "*Jim*"?\nAnswer:',
), (" no", " yes")  # fmt: skip
_SCIENCE = {"stem": "What is ice?", "choices": [{"text": "water", "label": "A"}, {"text": "stone", "label": "B"}]}
_ICE = ("Question: What is ice?\nAnswer:",), (" water", " stone")
_RACE = ("Article: A dog sat.\n\nQuestion: What sat?\nAnswer:",), (" A cat.", " A dog.", " A cow.", " A hen.")
_RACE_ROW = {
    "article": "A dog sat.", "questions": ["What sat?", "It _ ."], "answers": ["B", "D"],
    "options": [["A cat.", "A dog.", "A cow.", "A hen."], ["ran", "hid", "ate", "sat"]],
}  # fmt: skip
_SPAN = {"span1_index": 5, "span1_text": "Jim", "span2_index": 8, "span2_text": "he"}
_WSC_TEXT = 'Tom said " hello " to Jim , but he did n\'t listen .'
_HELLASWAG = {
    "ind": 3, "activity_label": "Baking", "ctx_a": "A man [step] mixes  dough.", "ctx_b": "the man",
    "ctx": "A man mixes dough. the man", "endings": ["sings.", "bakes [substeps] it.", "flies.", "sleeps."],
}  # fmt: skip
_BAKING = ("Baking: A man mixes dough. The man",), (" sings.", " bakes it.", " flies.", " sleeps.")
_PIQA = ("Question: Dry a cup\nAnswer:",), (" Use a cloth.", " Use a hose.")
_WINO = ("Tom beat Jim since Tom", "Tom beat Jim since Jim"), (" was strong.",)
_MULTIRC_PASSAGE = {
    "idx": 4, "passage": {"text": "Ann has a cat.", "questions": [
        {"idx": 7, "question": "Who has a pet?", "answers": [
            {"idx": 1, "text": "Ann", "label": 1}, {"idx": 2, "text": "Bob", "label": 0}]},
        {"idx": 8, "question": "What pet?", "answers": [{"idx": 3, "text": "A dog", "label": 0}]}]},
}  # fmt: skip

FORMS = [
    Form("boolq", {"BoolQ/val.jsonl": lines({"question": "is tea wet", "passage": "Tea is a drink.", "idx": 0,
         "label": True})}, *_BOOLQ),
    Form("boolq", {"boolq/dev.jsonl": lines({"question": "is tea wet", "title": "Tea", "passage": "Tea is a drink.",
         "answer": True})}, *_BOOLQ),
    Form("cb", {"CB/val.jsonl": lines({"premise": "She knew it rained.", "hypothesis": "It rained", "idx": 0,
         "label": "entailment"})}, *_CB, 0),
    Form("cb", {"cb_val.jsonl": lines({"premise": "She knew it rained.", "hypothesis": "It rained", "label": 2})}, *_CB, 2),
    Form("copa", {"COPA/val.jsonl": lines({"premise": "The cup fell.", "choice1": "It was pushed.", "label": 0,
         "choice2": "It was blue.", "question": "cause", "idx": 0})}, *_COPA),
    Form("rte", {"RTE/val.jsonl": lines({"premise": "Snow fell.", "hypothesis": "It snowed.", "label": "not_entailment"})},
         ("Snow fell.\nQuestion: It snowed. True or False?\nAnswer:",), (" True", " False"), 1),
    Form("wic", {"WiC/val.jsonl": lines({"word": "run", "sentence1": "He runs a shop.", "sentence2": "She ran home.",
         "start1": 3, "end1": 7, "start2": 4, "end2": 7, "label": False})}, *_WIC, 0),
    Form("wsc", {"WSC/val.jsonl": lines({"text": _WSC_TEXT, "target": {**_SPAN, "span2_index": 9}, "label": True})},
         *_WSC, 1),
    Form("wsc", {"wsc.fixed/validation.jsonl": lines({"text": _WSC_TEXT, **_SPAN, "span2_index": 9, "label": 0})}, *_WSC, 0),
    Form("multirc", {"MultiRC/val.jsonl": lines(_MULTIRC_PASSAGE)}, (_MULTIRC_CONTEXT,), (" no", " yes"), 1, 3),
    Form("multirc", {"multirc/validation.jsonl": lines({"paragraph": "Ann has a cat.", "question": "Who has a pet?",
         "answer": "Ann", "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 1})},
         (_MULTIRC_CONTEXT,), (" no", " yes"), 1),
    Form("lambada", {"lambada_openai.jsonl": lines({"context": "He sat on the", "continuation": "chair"})},
         ("He sat on the",), (" chair",)),
    Form("lambada", {"lambada_test.jsonl": lines({"text": "He sat on the chair"})}, ("He sat on the",), (" chair",)),
    Form("lambada", {"lambada_test_plain_text.txt": "he sat on the chair\nshe had tea\n"}, ("he sat on the",), (" chair",),
         0, 2),
    Form("piqa", {"piqa/valid.jsonl": lines({"goal": "Dry a cup", "sol1": "Use a cloth.", "sol2": "Use a hose."}),
         "piqa/valid-labels.lst": "1\n"}, *_PIQA, 1),
    Form("piqa", {"piqa_val.jsonl": lines({"query": "Question: Dry a cup\n", "choices": ["Use a cloth.", "Use a hose."],
         "gold": 0})}, *_PIQA, 0),
    Form("hellaswag", {"hellaswag_val.jsonl": lines({**_HELLASWAG, "label": 1})}, *_BAKING, 1),
    Form("hellaswag", {"hellaswag/validation.jsonl": lines({**_HELLASWAG, "label": "3"})}, *_BAKING, 3),
    Form("winogrande", {"winogrande_1.1/dev.jsonl": lines({"qID": "x", "sentence": "Tom beat Jim since _ was strong.",
         "option1": "Tom", "option2": "Jim", "answer": "1"})}, *_WINO, 0),
    Form("winogrande", {"winogrande_val.jsonl": lines({"context_options": list(_WINO[0]), "continuation": "was strong.",
         "gold": 1})}, *_WINO, 1),
    Form("arc_easy", {"ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl": lines({"id": "q", "question": _SCIENCE,
         "answerKey": "B"})}, *_ICE, 1),
    Form("arc_challenge", {"ARC-Challenge/test.jsonl": lines({"id": "q", "question": "What is ice?", "answerKey": "1",
         "choices": {"text": ["water", "stone"], "label": ["1", "2"]}})}, *_ICE, 0),
    Form("openbookqa", {"OpenBookQA-V1-Sep2018/Data/Main/test.jsonl": lines({"id": "q", "question": {**_SCIENCE,
         "stem": "Ice is"}, "answerKey": "A"})}, ("Ice is",), (" water", " stone"), 0),
    Form("openbookqa", {"openbookqa_test.jsonl": lines({"query": "Ice is", "choices": ["water", "stone"], "gold": 1})},
         ("Ice is",), (" water", " stone"), 1),
    Form("race_h", {f"RACE/test/high/{n}.txt": json.dumps({**_RACE_ROW, "id": f"high{n}.txt"}) for n in (1, 2)}, *_RACE, 1, 4),
    Form("race_h", {"race_high_test.jsonl": lines({"article": "A dog sat.", "question": "What sat?", "answer": "B",
         "options": _RACE_ROW["options"][0], "example_id": "high1.txt"})}, *_RACE, 1),
    Form("triviaqa", {"triviaqa-unfiltered/unfiltered-web-dev.json": json.dumps({"Data": [{"Question": "Who wrote Emma?",
         "Answer": {"Value": "Jane Austen", "Aliases": ["Austen"], "NormalizedAliases": ["austen"]}}], "Version": 1.0})},
         ("Question: Who wrote Emma?\nAnswer:",), ()),
    Form("triviaqa", {"rc.nocontext/validation.jsonl": lines({"question": "Who wrote Emma?", "answer": {
         "value": "Jane Austen", "aliases": ["Austen"], "normalized_aliases": ["austen"]}})},
         ("Question: Who wrote Emma?\nAnswer:",), ()),
    Form("webqs", {"webquestions.examples.test.json": json.dumps([{"url": "", "utterance": "where is rome?",
         "targetValue": '(list (description Italy) (description "the \\"boot\\""))'}])},
         ("Question: where is rome?\nAnswer:",), ()),
    Form("webqs", {"web_questions/test.jsonl": lines({"question": "where is rome?", "answers": ["Italy", 'the "boot"'],
         "url": ""})}, ("Question: where is rome?\nAnswer:",), ()),
]  # fmt: skip
