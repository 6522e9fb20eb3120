"""Every option states its facts, and who does not know an option refuses it by name."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.option import READERS, Facts, all_options
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.errors import ConfigErrors
from tests.harness.tiny import tiny_config, with_options

GROUPS = {f.name: type(getattr(PretrainConfig(), f.name)) for f in dataclasses.fields(PretrainConfig)}


def test_every_option_has_facts() -> None:
    bare = [f"{g}.{f.name}" for g, cls in GROUPS.items() for f in dataclasses.fields(cls) if "facts" not in f.metadata]
    assert not bare, f"no facts (option.py): {bare}"


def test_every_number_has_a_range() -> None:
    hints = {name: hint for cls in GROUPS.values() for name, hint in get_type_hints(cls).items()}
    for _, name, _, _, facts in all_options(PretrainConfig()):
        if any(kind in str(hints[name]) for kind in ("int", "float")):
            assert facts.range is not None, f"{name} is a number without a range"


def test_options_of_the_model_say_who_knows_them_and_begin_at_their_defaults() -> None:
    for _, name, value, default, facts in all_options(PretrainConfig()):
        assert value == default and facts.readers_of(value) <= READERS, name


@pytest.mark.parametrize("reader", sorted(READERS))
def test_an_option_that_a_reader_does_not_know_is_refused_by_name(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("moe", moe_layer_freq="1")
    refuse_unknown(config, reader, "a reader")
    field = next(f for f in dataclasses.fields(GROUPS["model"]) if f.name == "rotary_base")
    unknown: dict[str, Any] = {"facts": Facts(read_by=READERS - {reader})}
    monkeypatch.setattr(field, "metadata", unknown)
    refuse_unknown(config, reader, "a reader")  # at its default
    with pytest.raises(ConfigErrors, match=r"--rotary-base = 7.0: is not known to a reader"):
        refuse_unknown(with_options(config, rotary_base=7.0), reader, "a reader")


def test_experts_by_layer_are_refused_where_one_number_is_expected() -> None:
    config = tiny_config("moe", num_layers=4, num_experts=(2, 2, 4, 4))
    with pytest.raises(ConfigErrors, match="--num-experts"):
        refuse_unknown(config, "megatron", "others")
    for reader in ("decode", "export"):
        refuse_unknown(config, reader, "others")
