"""Metrics against figures worked out by hand, and statistics against brute force and closed forms."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats import contingency_tables

from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.evaluation.measurements import read_zero_shot
from megatron_samoe.evaluation.zero_shot.metrics import MetricResult, means, of_questions, perplexity, ratio
from megatron_samoe.evaluation.zero_shot.results import TaskResult, result_record
from megatron_samoe.evaluation.zero_shot.statistics import bootstrap_stderr, mcnemar, paired_bootstrap
from megatron_samoe.evaluation.zero_shot.tables import metric_line, notes, result_table, variation_table
from megatron_samoe.evaluation.zero_shot.variation import choose_iterations, compare, variations
from tests.harness.tables import table

TABLE = table(__file__)


@pytest.mark.parametrize("said, expected", TABLE["multirc"])
def test_multirc_by_hand(said: list[int], expected: tuple[float, ...]) -> None:
    # Three questions: (right, wrong), (right), (right, wrong, wrong), whose answers do not stand together.
    gold, questions = [True, False, True, True, False, False], ["a", "a", "b", "c", "c", "c"]
    order = [3, 0, 2, 4, 1, 5]
    found = of_questions([said[n] == 1 for n in order], [gold[n] for n in order], [questions[n] for n in order])
    assert {name: round(100 * m.value, 2) for name, m in found.items()} == dict(
        zip(("acc_per_answer", "em", "f1a", "yes_share"), expected, strict=True)
    )


def test_errors_of_shares_and_of_whole_questions() -> None:
    right = np.random.default_rng(0).random(500) < 0.3
    found = means(right)
    assert found.value == right.mean() and found.in_percent and found.is_binary
    assert found.stderr == pytest.approx(math.sqrt(found.value * (1 - found.value) / 499))
    assert bootstrap_stderr(found.x_UV, ratio, num_samples=4000) == pytest.approx(found.stderr, rel=0.05)
    assert bootstrap_stderr(found.x_UV, ratio) == bootstrap_stderr(found.x_UV, ratio), "equal seeds, equal errors"
    # Answers of a question that are right or wrong together leave a larger error than as many single ones.
    gold = np.repeat(right[:100], 5)
    apart, together = (
        of_questions([True] * 500, gold, [str(n // size) for n in range(500)])["acc_per_answer"].stderr
        for size in (1, 5)
    )
    assert together / apart == pytest.approx(math.sqrt(5), rel=0.15)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 9), (2600, 2400)])
def test_mcnemar_is_that_of_statsmodels(b: int, c: int) -> None:
    first = [True] * b + [False] * c + [True] * 4 + [False] * 3
    second = [False] * b + [True] * c + [True] * 4 + [False] * 3
    expected = contingency_tables.mcnemar([[4, b], [c, 3]], exact=True).pvalue
    test = mcnemar(first, second)
    assert (test.only_first, test.only_second, test.p_value) == (b, c, pytest.approx(expected))


def test_paired_bootstrap_uses_pairs() -> None:
    generator = np.random.default_rng(2)
    first = generator.random(400) < 0.5
    second = first.copy()
    second[np.flatnonzero(~first)[:12]] = True  # 12 items better and none worse
    units = [means(x).x_UV for x in (first, second)]
    better = paired_bootstrap(units[0], units[1], ratio)
    assert better.value == pytest.approx(0.03) and 0 < better.low < better.high < 0.06
    assert better.p_value < 0.01
    same = paired_bootstrap(units[0], units[0], ratio)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    # With 5 that are worse, too, the normal distribution is close.
    second[np.flatnonzero(first)[:5]] = False
    some, error = paired_bootstrap(units[0], means(second).x_UV, ratio), math.sqrt(17 - 7**2 / 400) / 400
    assert (some.low, some.high) == pytest.approx((7 / 400 - 1.96 * error, 7 / 400 + 1.96 * error), abs=0.1 * error)
    assert some.p_value == pytest.approx(2 * norm.sf(7 / 400 / error), rel=0.2)
    # Not paired, 12 of 400 would be within one standard error (0.035).
    other = paired_bootstrap(units[0], units[1][generator.permutation(400)], ratio)
    assert other.p_value > 0.1


def result(task: str, right: list[int], **facts: float) -> TaskResult:
    return TaskResult(task, len(right), {"acc": means(right)}, **facts)  # type: ignore[arg-type]


def test_variation_and_comparison_of_results() -> None:
    runs = [[result("boolq", right)] for right in ([1, 1, 1, 0], [1, 1, 0, 0])]
    (variation,) = variations(runs)
    assert variation.values == (0.75, 0.5) and variation.stderr == pytest.approx(math.sqrt(0.25 / 3))
    assert (variation.mean, variation.low, variation.high) == (0.625, 0.5, 0.75)
    assert variation.sd == pytest.approx(0.125 * math.sqrt(2)) and math.isnan(variations(runs[:1])[0].sd)
    (comparison,) = compare(*runs)
    assert comparison.difference.value == -0.25 and comparison.mcnemar is not None
    assert (comparison.mcnemar.only_first, comparison.mcnemar.only_second, comparison.mcnemar.p_value) == (1, 0, 1)


def test_tables_say_everything_once_and_have_no_empty_column() -> None:
    questions = TaskResult("multirc", 2, of_questions([True, False], [True, False], ["a", "b"]), num_cut=1)
    text = result_table([result("boolq", [1, 0], best_constant=0.5), questions])
    assert text.splitlines()[0].split("  ")[-1].strip() == "contexts cut" and text.count("boolq") == 1
    assert "best constant" in text and "best constant" not in result_table([questions])
    assert "contexts cut" not in result_table([result("boolq", [1, 0])])
    assert "std. error" not in result_table([TaskResult("mmlu", 9, {"acc": MetricResult(0.25, in_percent=True)})])
    assert metric_line(questions) == "acc_per_answer 100.00, em 100.00, f1a 100.00, yes_share 50.00"
    assert notes([questions], 16) == [
        "Contexts longer than the model's 16 tokens were cut from the left: multirc 1 of 2."
    ]
    group = TaskResult("mmlu", 9, {"acc": MetricResult(0.25, in_percent=True)})
    assert "std. error of one" not in variation_table(variations([[group], [group]]))


@pytest.mark.parametrize("wanted, expected", [("LAST:2", [30, 40]), ("last:1", [40]), ("10, 30,10", [10, 30])])
def test_checkpoints_are_chosen(wanted: str, expected: list[int]) -> None:
    assert choose_iterations(wanted, [10, 20, 30, 40], "f") == expected


@pytest.mark.parametrize(("wanted", "message"), TABLE["no checkpoints"])
def test_checkpoints_that_cannot_be_chosen(wanted: str, message: str) -> None:
    with pytest.raises(CheckpointError if "f has" in message else ConfigError, match=message):
        choose_iterations(wanted, [10, 20], "f")


def test_records_hold_no_value_that_json_lacks(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = means([-800.0, -900.0], perplexity)
        assert huge.value == math.inf and math.isnan(huge.stderr)
        assert math.isnan(paired_bootstrap(huge.x_UV, huge.x_UV, huge.finish).value)
    assert math.isnan(means([-2.0], perplexity).stderr)
    record = result_record(TaskResult("lambada_openai", 2, {"perplexity": huge, "acc": means([0, 1])}))
    assert record["metrics"]["perplexity"] == {"value": None, "stderr": None, "units": 2, "in_percent": False}
    assert record["best_constant"] is None
    # The report reads these, and those of earlier versions, which did not say what is in percent.
    for earlier in (False, True):
        if earlier:
            for metric in record["metrics"].values():
                del metric["in_percent"]
        content = {"runs": [{"checkpoint": "a/b", "results": [record]}]}
        (tmp_path / "r.json").write_text(json.dumps(content))
        assert [(row.metric, row.value) for row in read_zero_shot(tmp_path / "r.json")] == [
            ("perplexity", None),
            ("acc", 50),
        ]
