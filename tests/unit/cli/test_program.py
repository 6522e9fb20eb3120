"""Programs as dataclasses: what their words mean, and one sentence about what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from megatron_samoe.cli.program import Group, program, read
from megatron_samoe.errors import ConfigError
from tests.harness.tables import table

TABLE = table(__file__)


@dataclass(frozen=True)
class Size:
    width: int = 3
    """of it"""


@dataclass(frozen=True, kw_only=True)
class Cook:
    """cooks a meal

    With what is given
    (or else with what a walk to the market brings).
    """

    meal: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MEAL")]
    """what to cook"""
    salt: float = 0.5
    """grams"""
    guests: tuple[str, ...] = ("me",)
    """who comes"""
    heat: Literal["low", "high"] = "low"
    """of the stove"""
    pan: Path | None = None
    hurry: bool = False
    spices: tuple[str, ...] = ()
    """those that are at hand, of
    which there may be none at all"""
    size: Size = Size()

    def run(self) -> int:
        if self.meal == "stone":
            raise ConfigError("MEAL", self.meal, "must be food")
        return 3


def _more() -> Group:
    """more of it"""
    return Group({"cook": Cook})


COMMANDS = Group({"cook": Cook, "more": _more}, "About food.")


def test_words_become_fields() -> None:
    words = "cook soup --salt 2 --pan x --hurry --width 4 --heat=high --guests".split()
    assert read(COMMANDS, [*words, "--a -b", "c"]) == Cook(
        meal="soup", salt=2.0, guests=("--a -b", "c"), heat="high", pan=Path("x"), hurry=True, size=Size(4)
    )
    assert read(COMMANDS, ["more", "cook", "soup"]) == Cook(meal="soup")
    assert read(Cook, ["soup", "--salt", "-1e3"]).salt == -1000.0


@pytest.mark.parametrize(("words", "said"), TABLE["wrong"])
def test_what_is_wrong_is_said_in_one_line(words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        read(COMMANDS, words.split(), "food")
    found = capsys.readouterr().err
    assert ended.value.code == 2 and found.count("\n") == 1 and said in found


def test_help_shows_commands_and_flags(capsys: pytest.CaptureFixture) -> None:
    for words, shown in (
        (["-h"], ["About food.", "  cook  cooks a meal\n", "  more  more of it\n"]),
        (["cook", "--help"], ["With what is given", "--salt FLOAT", "grams", "{low,high}", "--width INT"]),
    ):
        with pytest.raises(SystemExit) as ended:
            read(COMMANDS, words, "food")
        said = capsys.readouterr().out
        assert not ended.value.code and all(part in said for part in shown), said
        assert "(default: )" not in said and "None" not in said


def test_help_fills_its_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Also where a text's source breaks before a bracket or a space."""
    monkeypatch.setenv("COLUMNS", "50")
    with pytest.raises(SystemExit):
        read(COMMANDS, ["cook", "--help"], "food")
    said = capsys.readouterr().out
    assert "\n\nWith what is given (or else with what a walk to\nthe market brings).\n\n" in said
    texts = ["those that are at", "hand, of which there", "may be none at all"]
    assert "--spices [STR [STR ...]]  " + f"\n{' ' * 28}".join(texts) + "\n" in said


def test_a_program_gives_the_status_and_says_errors(capsys: pytest.CaptureFixture) -> None:
    main = program(Cook)
    assert main(["soup"]) == 3
    assert main(["stone"]) == 2 and capsys.readouterr().err == "error: MEAL = 'stone': must be food\n"
