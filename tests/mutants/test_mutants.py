"""What is drawn computes something, and is planted where the code has moved to."""

from __future__ import annotations

import json

from tests.mutants.__main__ import LIST, likeliest, planted
from tests.mutants.draw import OPERATORS, PROJECT, _changes, mutate_code

TEXT = '''
from x import y

def scaled(value: int | None, factor: float = 2.5, *, name: str = "") -> "list[int] | None":
    """Returns 3 + 4."""
    if value is None:
        raise ValueError("of " + name + str(5 + 6))
    say_once(f"{7 + 8} " + name)
    return [*range(min(value, 9)), pack(value, scale=factor, strict=True)]
'''


def test_every_change_is_of_what_computes_and_is_python() -> None:
    changes = [change for line in _changes(TEXT) for change in line]
    mutants = {mutate_code(TEXT, OPERATORS[name], occurrence) for name, occurrence in changes}
    assert len(mutants) == len(changes)
    for mutant in mutants:
        compile(mutant, "", "exec")
    assert {line.strip() for text in mutants for line in set(text.splitlines()) - set(TEXT.splitlines())} == {
        'def scaled(value: int | None, factor: float = 3.5, *, name: str = "") -> "list[int] | None":',
        'def scaled(value: int | None, factor: float = 1.5, *, name: str = "") -> "list[int] | None":',
        "if value is not None:",
        "if not value is None:",
        "return [*range(max(value, 9)), pack(value, scale=factor, strict=True)]",
        "return [*range(min(value, 10)), pack(value, scale=factor, strict=True)]",
        "return [*range(min(value, 8)), pack(value, scale=factor, strict=True)]",
        "return [*range(min(value, 9)), pack(value, strict=True)]",
    }


def test_a_mutant_is_planted_at_the_nearest_place_and_gone_with_its_lines() -> None:
    mutant = {"line": 5, "before": "a = 1\nb", "after": "a = 2\nb"}
    assert planted(mutant, "a = 1\nb\nc\na = 1\nb\n") == "a = 1\nb\nc\na = 2\nb\n"
    assert planted(mutant, "a = 1\nc\n") is None


def test_tests_that_are_named_like_the_module_come_first() -> None:
    muon = next(m for m in json.loads(LIST.read_text()) if m["file"] == "megatron_samoe/optimizer/muon.py")
    assert likeliest(muon)[0] == "tests/unit/optimizer/test_muon.py"
    assert all((PROJECT / path).exists() for path in likeliest(muon))
