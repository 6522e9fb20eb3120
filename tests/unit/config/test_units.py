"""Figures of messages: no unit is so large that a figure rounds to nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_samoe.errors import in_units

PACKAGE = Path(__file__).resolve().parents[3] / "megatron_samoe"
POWERS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12}


@pytest.mark.parametrize("exponent", range(-3, 14))
@pytest.mark.parametrize("digits", [1.0, 1.234, 5.55, 9.994, 9.999])
def test_a_figure_is_what_it_was_to_three_digits(digits: float, exponent: int) -> None:
    value = digits * 10.0**exponent
    number, _, unit = in_units(value, "B/s").partition(" ")
    assert float(number) * 10 ** POWERS[unit.removesuffix("B/s")] == pytest.approx(value, rel=5e-3)
    assert "e" not in number


def test_no_message_has_a_fixed_unit_and_a_fixed_number_of_decimals() -> None:
    """The checks of a GPU, whose figures are those of GPUs, apart."""
    fixed = re.compile(r"\.\df\} ?[kMGT](i?B|FLOP)")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "gpu_check" not in path.parts and fixed.search(path.read_text())
    }
    assert not found
