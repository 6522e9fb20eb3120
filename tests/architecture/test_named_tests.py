"""Tests that the list of mutants names are there."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_mutant_that_was_found_names_a_test_that_is_there() -> None:
    mutants = json.loads((ROOT / "tests/mutants/mutants.json").read_text())
    names = {mutant["by"].partition("[")[0] for mutant in mutants if mutant.get("by")} - {"died", "hangs"}
    assert len(names) > 50
    for file, _, test in (name.partition("::") for name in names):
        assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file} has no {test}: which test finds the mutant now?"
