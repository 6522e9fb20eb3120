"""Every option states its facts; who does not know an option refuses it by name; one that is stated has an effect or is an error,
whatever its value; and what is a flag without a value in Megatron-LM is one here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import as_flags, parse, parse_pretrain_args, to_mapping
from megatron_samoe.config.option import READERS, Facts, all_options, flag
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.errors import ConfigErrors
from megatron_samoe.parsing import parse_yaml
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_options

GROUPS = {f.name: type(getattr(PretrainConfig(), f.name)) for f in dataclasses.fields(PretrainConfig)}
HINTS = {name: hint for cls in GROUPS.values() for name, hint in get_type_hints(cls).items()}
OPTIONS = {flag(name): (group, name) for group, name, *_ in all_options(PretrainConfig())}
NEEDY = [
    name
    for _, name, _, _, facts in all_options(PretrainConfig())
    if facts.needs is not None and not facts.needs.is_met(PretrainConfig())
]
LISTED = frozenset(parse_yaml((Path(__file__).resolve().parents[3] / "docs/megatron.yaml").read_text())["same"])
#: Those that Megatron-LM's own parser stores as true or false: a value after them is an error there.
WITHOUT_VALUE = {f"--{name}" for name in table(__file__)["without value"]}


def test_every_option_has_facts() -> None:
    bare = [f"{g}.{f.name}" for g, cls in GROUPS.items() for f in dataclasses.fields(cls) if "facts" not in f.metadata]
    assert not bare, f"no facts (option.py): {bare}"


def test_every_number_has_a_range() -> None:
    for _, name, _, _, facts in all_options(PretrainConfig()):
        if any(kind in str(HINTS[name]) for kind in ("int", "float")):
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


def stated_value(name: str) -> Any:
    """Returns a value to state: the default where there is one."""
    default = next(d for _, n, _, d, _ in all_options(PretrainConfig()) if n == name)
    if default is not None:
        return list(default) if isinstance(default, tuple) else default
    hint = next((h for h in get_args(HINTS[name]) if h is not type(None)), HINTS[name])
    if get_origin(hint) is Literal:
        return get_args(hint)[0]
    if get_origin(hint) is tuple:
        return [1] * len(get_args(hint))
    return {int: 1, float: 1.0, bool: True}.get(hint, "1")


def write(folder: Path, content: Any, name: str = "config") -> list[str]:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(folder / f"{name}.yaml")]


def test_every_idle_option_is_an_error_wherever_it_stands(tmp_path: Path) -> None:
    assert len(NEEDY) > 90 and {"moe_router_topk", "num_experts", "muon_momentum", "keep_last"} <= set(NEEDY)
    left = {name for name in NEEDY if name != "num_experts"}
    while left:  # those that met another's need among the others stand without it the next time
        stated = {name: stated_value(name) for name in sorted(left)}
        dashed = {name.replace("_", "-"): value for name, value in stated.items()}
        words = as_flags(stated)
        named = []
        for args in (words, write(tmp_path, stated, "a"), write(tmp_path, dashed, "b")):
            with pytest.raises(ConfigErrors) as found:
                parse_pretrain_args(args)
            named.append({problem.field[2:].replace("-", "_") for problem in found.value.errors})
        assert named[0] and named[0] == named[1] == named[2]
        left -= named[0]


def test_a_number_of_experts_makes_a_moe(tmp_path: Path) -> None:
    words = ["--num-experts", "64", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "0.01"]
    for args in (
        words,
        write(tmp_path, {"moe": {"num_experts": 64}}, "a"),
        [*write(tmp_path, {"moe_router_topk": 2}), *words],
    ):
        moe = parse_pretrain_args(args).moe
        assert (moe.expert_layout, moe.num_experts) == ("moe", 64)
    assert parse_pretrain_args([]).moe.expert_layout == "dense"
    assert parse_pretrain_args(["--num-experts", "4", "--expert-layout", "samoe"]).moe.expert_layout == "samoe"
    for args in (
        ["--num-experts", "8", "--expert-layout", "dense"],
        write(tmp_path, {"num_experts": 8, "expert_layout": "dense"}),
    ):
        with pytest.raises(ConfigErrors, match="--num-experts = 8: needs --expert-layout moe or samoe, not dense"):
            parse_pretrain_args(args)


def test_a_flag_may_take_away_what_the_files_options_need(tmp_path: Path) -> None:
    moe = {"expert_layout": "samoe", "num_experts": 16, "moe_router_topk": 4, "samoe_init": "uniform"}
    file = write(tmp_path, {"moe": moe, "optimizer": {"moe_router_lr_mult": 1.0}})
    config = parse_pretrain_args([*file, "--expert-layout", "dense"])
    assert (config.moe.moe_router_topk, config.moe.samoe_init) == (2, "cyclic")
    assert config.optimizer.moe_router_lr_mult == 0.5
    with pytest.raises(ConfigErrors, match="--moe-router-topk"):
        parse_pretrain_args([*file, "--expert-layout", "dense", "--moe-router-topk", "4"])


def test_a_saved_configuration_states_no_defaults(tmp_path: Path) -> None:
    config = parse_pretrain_args(["--num-layers", "3"])
    assert parse_pretrain_args(write(tmp_path, to_mapping(config))) == config


def test_a_checkpoint_says_of_which_kind_the_model_is(tmp_path: Path) -> None:
    saved = to_mapping(parse_pretrain_args([]))
    with pytest.raises(ConfigErrors, match="--num-experts"):
        parse(["--num-experts", "8"]).with_checkpoint(saved).settled()
    of_file = parse(write(tmp_path, {"expert_layout": "moe", "moe_router_topk": 4}))
    assert of_file.with_checkpoint(saved).settled().moe.moe_router_topk == 2
    saved = to_mapping(parse_pretrain_args(["--num-experts", "8"]))
    assert parse(["--moe-aux-loss-coeff", "0.1"]).with_checkpoint(saved).settled().moe.num_experts == 8


def test_a_flag_excuses_no_option_of_the_file_that_had_no_effect_without_it(tmp_path: Path) -> None:
    file = write(tmp_path, {"expert_layout": "samoe", "neighbour_unmask_steps": 4})
    for flags in ([], ["--expert-layout", "samoe"], ["--num-layers", "3"]):
        with pytest.raises(ConfigErrors, match="--neighbour-unmask-steps"):
            parse_pretrain_args([*file, *flags])


def test_needs_say_which_options_they_read() -> None:
    """Changing any other option leaves a need as it is, whether met or not."""
    needs = {id(facts.needs): facts.needs for *_, facts in all_options(PretrainConfig()) if facts.needs is not None}
    models = ("", "moe", "samoe --num-experts 8", "moe --expert-sharing pool", "moe --expert-sharing neighbours")
    strange = set()
    for words in models:
        base = parse(f"--expert-layout {words}".split() if words else []).config
        for group, name, value, default, _ in all_options(base):
            hint = HINTS[name]
            values = [*get_args(hint)] if get_origin(hint) is Literal else [default, not default, 3, "3"]
            for other in values:
                changed = replace(base, **{group: replace(getattr(base, group), **{name: other})})
                for need in needs.values():
                    if name not in need.reads and need.is_met(changed) != need.is_met(base):
                        strange.add((name, value, other, need.words))
    assert not strange
    assert all(need.reads for need in needs.values())


def booleans() -> set[str]:
    """Returns the options that are true or false, or derived until they are."""
    return {flag(name) for name, hint in HINTS.items() if hint is bool or bool in get_args(hint)}


def test_the_listed_ones_are_booleans_here_and_no_others() -> None:
    assert booleans() & LISTED == WITHOUT_VALUE


@pytest.mark.parametrize("name", sorted(booleans()))
def test_a_bare_flag_is_true(name: str) -> None:
    group, field = OPTIONS[name]
    for words in ([name], [name, "--lr", "0.5"]):
        config = parse(words).config
        assert getattr(getattr(config, group), field) is True
        assert config.optimizer.lr == (0.5 if len(words) > 1 else PretrainConfig().optimizer.lr)


def test_an_option_that_is_derived_can_be_given_as_false(capsys: pytest.CaptureFixture[str]) -> None:
    name = "--moe-router-pre-softmax"
    for words in ([name, "False"], [f"{name}=False"]):
        assert parse(words).config.moe.moe_router_pre_softmax is False
    assert parse([name, "None"]).config.moe.moe_router_pre_softmax is None
    with pytest.raises(SystemExit):
        parse_pretrain_args([name, "maybe"])
    assert "not one of" in capsys.readouterr().err
