"""Any text whatever gives plain values or one line of error, in little time and memory, whose figures round to no nothing; plain values
become dataclasses, where what does not fit is named by its place."""

from __future__ import annotations

import contextlib
import json
import re
import time
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_samoe.config.typed import typed
from megatron_samoe.errors import ConfigError, in_units, shown
from megatron_samoe.parsing import MAX_YAML_CHARACTERS, _document, _FastLoader, _Loader, parse_json, parse_yaml
from tests.harness.tables import table

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 12)
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_SCRAPS = [*"[]{}:,\na'|>1\t\x00\ud800#@", '"', "*a", "0x", ".inf", "2001-99-99", "---\n"]
_SCRAPS += [f"{word} " for word in "- ? <<: &a !!int !!set !!map !!bool".split()]
SCRAPS = st.lists(st.sampled_from(_SCRAPS), max_size=25).map("".join)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested in more than 100 levels"),
        ("- " * 20_000, "nested in more than 100 levels"),
        (BOMB, "aliases that stand for more values"),
        ("a: &a [*a]", "aliases that stand for more values"),
        ("a: !!int x", "invalid literal"),
        ("a: !!bool x", "a tag or a character that does not fit"),
        ("!!map [x]", "expected a mapping node"),
        ("? [1]\n: 2", "unhashable"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("a: " + "9" * 5000, "4300 digits"),
        ('"\\UFFFFFFFF"', "a tag or a character that does not fit"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("\x00", "not allowed"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_what_is_no_plain_yaml_is_one_line(text: str, reason: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500
    assert reason in str(caught.value) or "does not fit" in str(caught.value)
    assert time.process_time() - began < 5.0
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_what_yaml_wrote_is_read_again(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


@given(PLAIN.map(yaml.safe_dump) | SCRAPS)
@example("a: 0101\nb: 2020-01-01\nc: -0\nd: 1_000\ne: 0x1F\nf: yes\ng: 1e-3\nh: 1.5e-3")
@settings(max_examples=500, deadline=None)
def test_the_fast_loader_reads_what_the_other_one_reads(text: str) -> None:
    read = []
    for kind in (_FastLoader, _Loader):
        with contextlib.suppress(Exception):  # what one refuses is read by the other, or told in its words
            read.append(repr(_document(kind, text)))
    assert len(set(read)) <= 1


@given(SCRAPS)
@example(BOMB)
@settings(max_examples=1000, deadline=None)
def test_any_yaml_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except ValueError as error:
        assert "\n" not in str(error)


@given(st.text(alphabet='[]{}:,"\\u0189dDeE+-. ntfaINay\n') | PLAIN.map(json.dumps))
@settings(max_examples=700, deadline=None)
def test_any_json_is_read_or_refused(text: str) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "half of a character"),
        (b"\xff", "UTF-8"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json_says_why(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    with pytest.raises(ValueError, match="NaN"):
        parse_json("[NaN]", finite=True)


def test_aliases_and_merges_that_people_write_are_read() -> None:
    text = "base: &b {lr: 1e-3, n: 2}\nruns:\n  a: {<<: *b, n: 3}\n  b: *b\npattern: 0101\ndate: 2026-01-01\n"
    assert parse_yaml(text) == {
        "base": {"lr": "1e-3", "n": 2},
        "runs": {"a": {"lr": "1e-3", "n": 3}, "b": {"lr": "1e-3", "n": 2}},
        "pattern": "0101",
        "date": "2026-01-01",
    }


@pytest.mark.parametrize(
    "value",
    ["x" * 100_000, list(range(100_000)), 10**5000, {n: [[[[n]]]] for n in range(1000)}],
    ids=["text", "list", "digits", "nested"],
)
def test_a_message_is_not_as_large_as_what_it_refuses(value: object) -> None:
    assert len(shown(value)) <= 1000
    assert len(str(ConfigError("--lr", value, "must be a number"))) < 1100


def _filled(line: str, end: str = "", size: int = MAX_YAML_CHARACTERS) -> str:
    """Returns as many numbered lines as a file may have, and an end."""
    count = size // len(line.format(999_999))
    return "".join(line.format(n) for n in range(count)) + end


LARGE = {
    "keys": _filled("k{}: 1\n"),
    "keys, and a fault of syntax at the end": _filled("k{}: 1\n", "x: [\n"),
    "keys, and one twice": _filled("k{}: 1\n", "k0: 1\n"),
    "anchors": _filled("- &a{} 1\n"),
    "too many": _filled("k{}: 1\n", size=12 * MAX_YAML_CHARACTERS),
    "digits": "a: " + "9" * 100_000,
}


@pytest.mark.parametrize("case", LARGE)
def test_a_large_file_is_read_or_refused_in_seconds(case: str) -> None:
    """The bound of processor time is ten times what it takes here; the slower loader alone would take a minute."""
    start = time.process_time()
    try:
        parse_yaml(LARGE[case])
        assert case in ("keys", "anchors")
    except ValueError as error:
        assert case not in ("keys", "anchors") and "\n" not in str(error) and len(str(error)) < 600
    assert time.process_time() - start < 30


def test_a_fault_has_its_line_and_no_made_up_file() -> None:
    with pytest.raises(ValueError, match="at line 2, column 1") as caught:
        parse_yaml("a: [1,\n")
    assert "<unicode string>" not in str(caught.value)
    with pytest.raises(ValueError, match="the key 'a' is there twice, at line 3, column 1"):
        parse_yaml("a: 1\nb: 2\na: 3\n")


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


TABLE = table(__file__, tuples=False)


@dataclass(frozen=True)
class Inner:
    from_: str
    at_most: float | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    sizes: tuple[int, ...]
    file: Path = Path("here")
    kind: Literal["a", "b"] = "a"
    one: Inner | None = None
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    words: str | tuple[str, ...] = ()
    flag: bool = False


def test_every_form_of_value_becomes_its_fields_type() -> None:
    content = yaml.safe_load("""
        {name: x, sizes: 3, file: there, one: {from: a, at-most: 3e-4}, many: [{from: b}, {from: c, at_most: 1}],
        by-name: {1: {from: d}}, options: {e: null, f: {g: [1, null]}}, words: h, flag: true, kind: null}
    """)
    many, by_name, options = (Inner("b"), Inner("c", 1.0)), {"1": Inner("d")}, {"e": {}, "f": {"g": [1, None]}}
    expected = Outer("x", (3,), Path("there"), "a", Inner("a", 3e-4), many, by_name, options, "h", True)
    assert typed(Outer, content, "f.yaml") == expected
    assert typed(Outer, {"name": "x", "sizes": [1], "words": ["a", 2, 0.5]}, "f.yaml").words == ("a", "2", "0.5")


@pytest.mark.parametrize(("changes", "place", "said"), TABLE["refused"])
def test_what_does_not_fit_is_named_by_its_place(changes: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        typed(Outer, {"name": "x", "sizes": [1], **changes}, "f.yaml")
    assert caught.value.field == place

    for no_mapping in (None, [], "text"):
        with pytest.raises(ConfigError, match=r"f.yaml = .*: must be a mapping in f.yaml"):
            typed(Outer, no_mapping, "f.yaml")
