"""Constant predictors on the real data sets, against the majority rates that are known of them.

The files are not part of the project, as not all licences allow that: the environment variable names their folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_samoe.cli.evaluate import DATA_VARIABLE
from megatron_samoe.evaluation.zero_shot.predictors import ConstantPredictor
from megatron_samoe.evaluation.zero_shot.prepare import ask, prepare

FOLDER = os.environ.get(DATA_VARIABLE, "")
pytestmark = pytest.mark.skipif(not FOLDER, reason=f"{DATA_VARIABLE} names no folder with the real data sets")
MULTIRC = {
    "always-yes": (42.80, 0.84, 59.95, 100.0),
    "always-no": (57.20, 0.31, 0.0, 0.0),
    "oracle": (100.0, 100.0, 100.0, 42.80),
}
#: Items, and the best constant predictor's accuracy.
MAJORITY = {"boolq": (3270, 62.17), "cb": (56, 50.0), "copa": (100, 55.0), "wsc": (104, 63.46)}
SIZES = {"lambada": 5153, "piqa": 1838, "winogrande": 1267, "arc_easy": 2376, "openbookqa": 500, "multirc": 4848}


def percentages(names: str, predictor: str) -> dict[str, dict[str, float]]:
    results = ask(prepare(names, Path(FOLDER)), ConstantPredictor(predictor), lambda result: None)
    return {r.task: {name: round(100 * m.value, 2) for name, m in r.metrics.items()} for r in results}


@pytest.mark.parametrize("predictor", MULTIRC)
def test_multirc(predictor: str) -> None:
    assert tuple(percentages("multirc", predictor)["multirc"].values()) == MULTIRC[predictor]


def test_majority_rates() -> None:
    found = [percentages(",".join(MAJORITY), predictor) for predictor in ("always-yes", "always-no")]
    for task, (_, accuracy) in MAJORITY.items():
        assert max(results[task]["acc"] for results in found) == accuracy


def test_every_file_is_read_whole_and_an_oracle_knows_it_all() -> None:
    sizes = {**SIZES, **{task: size for task, (size, _) in MAJORITY.items()}}
    questions = prepare(",".join(sizes), Path(FOLDER))
    assert {task.name: len(items) for task, items in questions.tasks} == sizes
    for results in percentages(",".join(sizes), "oracle").values():
        assert all(value == 100 for name, value in results.items() if name not in ("yes_share", "perplexity"))
