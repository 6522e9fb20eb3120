"""Each option of a run does what it says: a test sees it, which fails where the program reads the default instead."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.option import all_options
from tests.options.table import LEFT, PROJECT, ROWS, problem_of

OPTIONS = {name: (default, facts) for _, name, _, default, facts in all_options(PretrainConfig())}


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((PROJECT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_option_has_a_row_and_no_other_has() -> None:
    assert not ROWS.keys() & LEFT.keys() and len(LEFT) <= 4
    assert set(ROWS) | set(LEFT) == set(OPTIONS)


@pytest.mark.parametrize("option", ROWS)
def test_a_row_has_a_value_to_see_and_a_test_that_is_there(option: str) -> None:
    (default, facts), row = OPTIONS[option], ROWS[option]
    file, _, test = row.test.partition("::")
    assert test.partition("[")[0] in functions(file) and len(row.seen.split()) > 1
    assert row.value is None or row.value != default
    for number in row.value if isinstance(row.value, tuple) else (row.value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            assert number < facts.largest and (number or option == "profile_ranks")


@pytest.mark.night
@pytest.mark.parametrize("option", ROWS)
def test_its_test_fails_where_the_option_is_ignored(option: str) -> None:
    problem = problem_of(option)
    assert not problem, problem
