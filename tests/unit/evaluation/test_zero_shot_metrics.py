"""Metrics against figures worked out by hand, and statistics against brute force and closed forms."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.evaluation.zero_shot.items import Item, Response, groups_of
from megatron_samoe.evaluation.zero_shot.metrics import METRICS, normalise_answer
from megatron_samoe.evaluation.zero_shot.predictors import ConstantPredictor
from megatron_samoe.evaluation.zero_shot.results import TaskResult, evaluate_task, measure, result_record
from megatron_samoe.evaluation.zero_shot.statistics import (
    binomial_stderr,
    bootstrap_stderr,
    mcnemar,
    paired_bootstrap,
)
from megatron_samoe.evaluation.zero_shot.tables import metric_line, notes, result_table
from megatron_samoe.evaluation.zero_shot.task import Task, load_task
from megatron_samoe.evaluation.zero_shot.variation import Variation, choose_iterations, compare, variations


class Fixed:
    """Answers with the choices it was given."""

    def __init__(self, choices: Sequence[int]):
        self.choices = choices

    def respond(self, task: Task, items: Sequence[Item]) -> list[Response]:
        return [
            Response(tuple(0.0 if n == choice else -1.0 for n in range(len(item.pairs))), (False,) * len(item.pairs))
            for item, choice in zip(items, self.choices, strict=True)
        ]


def ranked(golds: Sequence[int], groups: Sequence[str] = (), choices: Sequence[str] = ("no", "yes")) -> list[Item]:
    return [
        Item(f"x:{n}", ("c",), tuple(f" {c}" for c in choices), gold, group=group, choice_texts=tuple(choices))
        for n, (gold, group) in enumerate(itertools.zip_longest(golds, groups, fillvalue=""))
    ]


def values(result: TaskResult) -> dict[str, float]:
    return {name: round(100 * measured.value, 2) for name, measured in result.metrics.items()}


def test_multirc_by_hand() -> None:
    # Three questions: (right, wrong), (right), (wrong, wrong, right).
    items = ranked([1, 0, 1, 0, 0, 1], ["a", "a", "b", "c", "c", "c"])
    result = evaluate_task(load_task("multirc"), items, Fixed([1, 0, 1, 1, 0, 0]))
    # 4 of 6 answers; questions a and b whole; 2 hits of 3 said and 3 true; 3 of 6 said yes.
    assert values(result) == {"acc_per_answer": 66.67, "em": 66.67, "f1a": 66.67, "yes_share": 50.0}
    result = evaluate_task(load_task("multirc"), items, Fixed([1, 1, 1, 1, 1, 1]))
    assert values(result) == {"acc_per_answer": 50.0, "em": 33.33, "f1a": 66.67, "yes_share": 100.0}
    line = metric_line(result)
    assert line == "acc_per_answer 50.00, em 33.33, f1a 66.67, yes_share 100.00"
    assert all(name in result_table([result]) for name in ("acc_per_answer", "em", "f1a", "yes_share"))


@pytest.mark.parametrize(
    "predictor, expected",
    [
        ("always-yes", (40.0, 0.0, 57.14, 100.0)),
        ("always-no", (60.0, 50.0, 0.0, 0.0)),
        ("oracle", (100.0, 100.0, 100.0, 40.0)),
    ],
)
def test_multirc_of_constant_predictors(predictor: str, expected: tuple[float, ...]) -> None:
    items = ranked([1, 0, 1, 0, 0], ["a", "a", "a", "b", "b"])
    result = evaluate_task(load_task("multirc"), items, ConstantPredictor(predictor))
    assert tuple(values(result).values()) == expected
    assert result.best_constant == 0.6


def test_groups_need_not_stand_together() -> None:
    items = ranked([0] * 5, ["b", "a", "", "b", "a"])
    assert groups_of(items) == [[0, 3], [1, 4], [2]]


def test_macro_f1_by_hand() -> None:
    items = ranked([0, 0, 1, 1, 2], choices=("True", "False", "Neither"))
    said = evaluate_task(load_task("cb"), items, Fixed([0, 1, 1, 1, 0]))
    # F1 by class: 2 * 1 / (2 + 2), 2 * 2 / (3 + 2), 0 / (0 + 1).
    assert values(said) == {"acc": 60.0, "f1_macro": round(100 * (0.5 + 0.8 + 0) / 3, 2)}
    # A class that nobody said and nothing is does not count, so an oracle has no spread.
    oracle = evaluate_task(load_task("cb"), items, ConstantPredictor("oracle"))
    assert oracle.metrics["f1_macro"].value == 1 and oracle.metrics["f1_macro"].stderr == 0


def test_length_normalisation() -> None:
    items = [Item("x", ("c",), (" ab", " äöüß"), 1, choice_texts=("ab", "äöüß"))]
    # Per character -2.0 and -1.9, per byte -2.0 and -0.95; the plain sums favour the short one.
    response = [Response((-4.0, -7.6), (False, False))]
    found = {name: METRICS[name].units(items, response)[0, 0] for name in ("acc", "acc_norm", "acc_bytes")}
    assert found == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}
    response = [Response((-4.0, -12.0), (False, False))]
    found = {name: METRICS[name].units(items, response)[0, 0] for name in ("acc", "acc_norm", "acc_bytes")}
    assert found == {"acc": 0, "acc_norm": 0, "acc_bytes": 1}


def test_equal_scores_go_to_the_first_choice() -> None:
    items = ranked([0, 1])
    assert METRICS["acc"].units(items, [Response((-1.0, -1.0), (False, False))] * 2)[:, 0].tolist() == [1, 0]


def test_greedy_match_and_perplexity() -> None:
    items = [Item(f"x:{n}", ("c",), (" w",), choice_texts=("w",)) for n in range(2)]

    class Model:
        def respond(self, task: Task, items: Sequence[Item]) -> list[Response]:
            return [Response((-1.0,), (True,)), Response((-3.0,), (False,))]

    result = evaluate_task(load_task("lambada"), items, Model())
    assert result.metrics["acc"].value == 0.5 and math.isnan(result.best_constant)
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(2.0))
    assert notes([result], 16) == []


@pytest.mark.parametrize(
    "text, right",
    [(" The  jane Austen!", True), ("Austen", True), ("Jane", False), ("", False), ("Jane, Austen", True)],
)
def test_exact_match_forgives_articles_case_and_punctuation(text: str, right: bool) -> None:
    item = Item("x", ("c",), answers=("Jane Austen", "austen"))
    assert METRICS["exact_match"].units([item], [Response(text=text)])[0, 0] == right


def test_normalised_answers() -> None:
    assert normalise_answer("The_Man's  a `test'") == "man s test"


def test_constant_predictors_where_text_is_asked_for() -> None:
    item = Item("x", ("c",), answers=("yes", "yeah"))
    task = load_task("webqs")
    assert [ConstantPredictor(n).respond(task, [item])[0].text for n in ("always-yes", "always-no", "oracle")] == [
        "yes",
        "no",
        "yes",
    ]
    with pytest.raises(ConfigError, match=r"--predictor = 'always-yess'.*Did you mean 'always-yes'\?"):
        ConstantPredictor("always-yess")


def test_binomial_error() -> None:
    assert 100 * binomial_stderr(0.5, 56) == pytest.approx(6.68, abs=0.005)
    assert 100 * binomial_stderr(0.5, 100) == 5.0


def test_bootstrap_agrees_with_the_binomial_error() -> None:
    right = np.random.default_rng(0).random(500) < 0.3
    x_UV = np.stack((right, np.ones(500)), axis=1).astype(float)
    error = bootstrap_stderr(x_UV, METRICS["acc"].finish, num_samples=4000)
    assert error == pytest.approx(binomial_stderr(right.mean(), 500), rel=0.05)
    assert error == bootstrap_stderr(x_UV, METRICS["acc"].finish, num_samples=4000), "equal seeds, equal errors"
    assert math.isnan(bootstrap_stderr(x_UV[:1], METRICS["acc"].finish))


def test_grouped_units_are_resampled_whole() -> None:
    """Answers of a question that are right or wrong together leave a larger error than as many single ones."""
    generator = random.Random(1)
    right = [generator.random() < 0.5 for _ in range(100)]
    golds = [int(r) for r in right for _ in range(5)]
    apart = evaluate_task(load_task("multirc"), ranked(golds, [str(n) for n in range(500)]), Fixed([1] * 500))
    together = evaluate_task(load_task("multirc"), ranked(golds, [str(n // 5) for n in range(500)]), Fixed([1] * 500))
    ratio = together.metrics["acc_per_answer"].stderr / apart.metrics["acc_per_answer"].stderr
    assert ratio == pytest.approx(math.sqrt(5), rel=0.15)


def test_mcnemar_against_all_outcomes() -> None:
    for b, c in ((0, 0), (1, 0), (5, 1), (3, 3), (2, 9)):
        first = [True] * b + [False] * c + [True] * 4 + [False] * 3
        second = [False] * b + [True] * c + [True] * 4 + [False] * 3
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=b + c)]
        as_uneven = sum(abs(o - (b + c) / 2) >= abs(b - (b + c) / 2) for o in outcomes)
        test = mcnemar(first, second)
        assert (test.only_first, test.only_second) == (b, c)
        assert test.p_value == pytest.approx(as_uneven / len(outcomes))
    # Large counts: the normal approximation with continuity correction is close.
    test = mcnemar([True] * 2600 + [False] * 2400, [False] * 2600 + [True] * 2400)
    assert test.p_value == pytest.approx(math.erfc((200 - 1) / math.sqrt(5000) / math.sqrt(2)), rel=0.01)


def test_paired_bootstrap_uses_pairs() -> None:
    generator = np.random.default_rng(2)
    first = generator.random(400) < 0.5
    second = first.copy()
    second[np.flatnonzero(~first)[:12]] = True  # 12 items better and none worse
    units = [np.stack((x, np.ones(400)), axis=1).astype(float) for x in (first, second)]
    better = paired_bootstrap(units[0], units[1], METRICS["acc"].finish)
    assert better.value == pytest.approx(0.03) and 0 < better.low < better.high < 0.06
    assert better.p_value < 0.01
    same = paired_bootstrap(units[0], units[0], METRICS["acc"].finish)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    # Not paired, 12 of 400 would be within one standard error (0.035).
    other = paired_bootstrap(units[0], units[1][generator.permutation(400)], METRICS["acc"].finish)
    assert other.p_value > 0.1


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Of pairs of equally good models about 5 % differ at 5 %, by either test."""
    generator = np.random.default_rng(3)
    alarms = np.zeros(2)
    for trial in range(200):
        first, second = generator.random((2, 120)) < 0.6
        units = [np.stack((x, np.ones(120)), axis=1).astype(float) for x in (first, second)]
        alarms += (
            mcnemar(first, second).p_value < 0.05,
            paired_bootstrap(*units, METRICS["acc"].finish, num_samples=300, seed=trial).p_value < 0.05,
        )
    assert alarms[0] / 200 < 0.08 and 0.02 < alarms[1] / 200 < 0.09


def test_spread() -> None:
    over = Variation("boolq", "acc", True, (1.0, 2.0, 6.0), 0.1).spread
    assert over == {"mean": 3, "sd": pytest.approx(math.sqrt(7)), "low": 1, "high": 6}
    assert math.isnan(Variation("boolq", "acc", True, (1.0,), 0.1).spread["sd"])


def test_variation_and_comparison_of_results() -> None:
    items = ranked([0, 1, 1, 0])
    runs = [[evaluate_task(load_task("boolq"), items, Fixed(said))] for said in ([0, 1, 1, 1], [0, 1, 0, 1])]
    (variation,) = variations(runs)
    assert variation.values == (0.75, 0.5) and variation.spread["mean"] == 0.625
    assert variation.stderr == binomial_stderr(0.5, 4)
    (comparison,) = compare(*runs)
    assert comparison.difference.value == -0.25 and comparison.mcnemar is not None
    assert (comparison.mcnemar.only_first, comparison.mcnemar.only_second, comparison.mcnemar.p_value) == (1, 0, 1)


@pytest.mark.parametrize("wanted, expected", [("LAST:2", [30, 40]), ("last:1", [40]), ("10, 30,10", [10, 30])])
def test_checkpoints_are_chosen(wanted: str, expected: list[int]) -> None:
    assert choose_iterations(wanted, [10, 20, 30, 40], "f") == expected


@pytest.mark.parametrize(
    "wanted, error, message",
    [
        ("LAST:9", CheckpointError, "there are only 2; f has iterations 10, 20"),
        ("LAST:0", ConfigError, "must be LAST:N or a list"),
        ("LAST:²", ConfigError, "must be LAST:N or a list"),
        ("LAST:x", ConfigError, "must be LAST:N or a list"),
        ("FIRST:2", ConfigError, "must be LAST:N or a list"),
        ("", ConfigError, "must be LAST:N or a list"),
        ("10,15", CheckpointError, "15 is not there; f has iterations 10, 20"),
    ],
)
def test_checkpoints_that_cannot_be_chosen(wanted: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_iterations(wanted, [10, 20], "f")


def test_records_hold_no_value_that_json_lacks() -> None:
    items = [Item("x", ("c",), (" w",), choice_texts=("w",))]
    record: dict[str, Any] = result_record(evaluate_task(load_task("lambada"), items, ConstantPredictor("always-no")))
    assert record["metrics"]["perplexity"] == {"value": None, "stderr": None, "units": 1}
    assert record["metrics"]["acc"]["value"] == 0 and record["best_constant"] is None


def test_one_unit_has_no_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = measure(METRICS["perplexity"], np.array([[-800.0, 1.0], [-900.0, 1.0]]))
        assert huge.value == math.inf and math.isnan(huge.stderr)
        assert math.isnan(paired_bootstrap(huge.x_UV, huge.x_UV, huge.metric.finish).value)
    assert math.isnan(measure(METRICS["perplexity"], np.array([[-2.0, 1.0]])).stderr)
