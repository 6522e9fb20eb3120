"""Plain values as dataclasses: what fits becomes the field's type, and all else is named by its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from megatron_samoe.config.typed import typed
from megatron_samoe.errors import ConfigError
from tests.harness.tables import table

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


@pytest.mark.parametrize("content", [None, [], "text"])
def test_a_file_that_holds_no_mapping(content: object) -> None:
    with pytest.raises(ConfigError, match=r"f.yaml = .*: must be a mapping in f.yaml"):
        typed(Outer, content, "f.yaml")
