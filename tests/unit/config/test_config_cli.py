"""Flags, YAML files and checkpoints fill the same configuration; those of earlier versions keep their meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.cli import foreign_flags, from_mapping, parse, parse_pretrain_args, read_yaml, to_mapping
from megatron_samoe.config.derived import parse_moe_layer_freq
from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.saved import upgrade
from megatron_samoe.errors import ConfigError, ConfigErrors
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_options

TABLE = table(__file__)

#: Options with their groups.
OPTIONS = [(group, name) for group, name, *_ in all_options(PretrainConfig())]


def write(folder: Path, content: str) -> str:
    path = folder / "run.yaml"
    path.write_text(content)
    return str(path)


def test_no_two_groups_share_a_flag() -> None:
    assert len(OPTIONS) == len({name for _, name in OPTIONS})


def test_help_has_a_line_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_pretrain_args(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert not [name for _, name in OPTIONS if flag(name) not in shown]


@pytest.mark.parametrize(("wrong", "right"), TABLE["misspelt"])
def test_misspelt_flag_is_refused_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{wrong} is not known\. Did you mean '{right}'\?$"):
        parse_pretrain_args([wrong, "16"])


def test_no_flag_is_proposed_that_is_far() -> None:
    with pytest.raises(ConfigError, match=r"^--chocolate is not known\.$"):
        parse_pretrain_args(["--chocolate"])


@pytest.mark.parametrize(
    "args", [["--train-iters", "many"], ["--lr-decay-style", "wsd"], ["--bf16", "True"], ["--num-layers"]]
)
def test_malformed_flag_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_pretrain_args(args)
    assert left.value.code == 2
    assert args[-1] in "".join(capsys.readouterr())


def test_quiet_rank_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--hidden-size", "many"], quiet=True)
    assert "".join(capsys.readouterr()) == ""


def test_flags_override_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "num_layers: 3\nmodel: {hidden-size: 64}\nlr: 3e-4\ndata_path: [0.5, a, 1, b]\nsplit: 100\n")
    config = parse_pretrain_args([f"--config={path}", "--num-layers", "5"])
    assert config.model.num_layers == 5 and config.model.hidden_size == 64
    assert config.optimizer.lr == 3e-4
    assert config.data.data_path == ("0.5", "a", "1", "b") and config.data.split == "100"


@pytest.mark.parametrize(("content", "field", "said"), TABLE["wrong files"])
def test_wrong_yaml_is_refused(content: str, field: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_pretrain_args(["--config", write(tmp_path, content)])
    assert raised.value.field == field
    assert said in str(raised.value)


def test_an_option_named_as_its_group_may_stand_flat(tmp_path: Path) -> None:
    assert parse_pretrain_args(["--config", write(tmp_path, "optimizer: muon")]).optimizer.optimizer == "muon"
    nested = parse_pretrain_args(["--config", write(tmp_path, "optimizer: {lr: 0.5}")]).optimizer
    assert (nested.optimizer, nested.lr) == ("adam", 0.5)


def test_layer_pattern_may_be_a_yaml_list(tmp_path: Path) -> None:
    config = parse_pretrain_args(["--config", write(tmp_path, "moe_layer_freq: [0, 1]\n")])
    assert parse_moe_layer_freq(config.moe.moe_layer_freq, 2) == (False, True)


def test_empty_yaml_changes_nothing_and_missing_is_named(tmp_path: Path) -> None:
    assert read_yaml(Path(write(tmp_path, ""))) == {}
    with pytest.raises(ConfigError, match=r"absent\.yaml.*cannot be read"):
        parse_pretrain_args(["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ConfigError, match="Is a directory"):
        parse_pretrain_args(["--config", str(tmp_path)])
    with pytest.raises(ConfigError, match="needs the path"):
        parse_pretrain_args(["--config"])


def options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "num_layers": st.integers(1, 99),
            "ffn_hidden_size": st.none() | st.integers(1, 10**6),
            "lr": st.floats(allow_nan=False),
            "moe_expert_capacity_factor": st.none() | st.floats(0.1, 10),
            "bf16": st.booleans(),
            "samoe_normalization": st.sampled_from(["none", "l2", "softmax"]),
            "recompute_granularity": st.sampled_from([None, "full", "selective"]),
            "data_path": st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"]))).map(tuple),
            "save": st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
            "moe_layer_freq": st.sampled_from(["1", "01", "0101", "010", "[0,1]*4", "10"]),
            "moe_router_pre_softmax": st.none() | st.booleans(),
        },
    )


@settings(deadline=None, max_examples=80)
@given(options())
def test_configuration_survives_yaml(changes: dict[str, Any]) -> None:
    config = with_options(PretrainConfig(), **changes)
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    assert from_mapping(yaml.safe_load(text), "config.yaml") == config


def test_saved_configuration_is_complete() -> None:
    mapping = to_mapping(tiny_config("samoe"))
    assert [(group, name) for group, options in mapping.items() for name in options] == OPTIONS


def test_checkpoint_arguments_lie_between_yaml_and_flags(tmp_path: Path) -> None:
    saved = tiny_config("samoe", num_layers=6, hidden_size=48, train_iters=77, tensor_model_parallel_size=2)
    saved = with_options(saved, vocab_size=300, data_path=("theirs",))
    path = write(tmp_path, "hidden_size: 80\nlr: 0.5\nnum_layers: 9\n")
    asked = parse(["--config", path, "--load", "somewhere", "--num-layers", "7"])
    assert (asked.said["num_layers"], asked.said["hidden_size"]) == ("flag", "file") and "num_experts" not in asked.said
    known = asked.with_checkpoint(to_mapping(saved))
    config = known.settled()
    assert (known.said["num_layers"], known.said["hidden_size"], known.said["lr"]) == ("flag", "checkpoint", "file")
    assert known.said["num_experts"] == known.said["vocab_size"] == "checkpoint" and "data_path" not in known.said
    assert config.model.num_layers == 7, "a flag beats the checkpoint"
    assert config.model.hidden_size == 48, "the checkpoint beats the file"
    assert config.moe == saved.moe and config.data.vocab_size == 300
    assert config.optimizer.lr == 0.5 and config.training.train_iters == 100, "the run's own options stay"
    assert config.data.data_path == () and config.parallel.tensor_model_parallel_size == 1
    assert asked.settled().model.hidden_size == 80


def test_run_dir_fills_paths_that_are_not_given() -> None:
    config = parse_pretrain_args(["--run-dir", "runs/x", "--save", "elsewhere"])
    assert (config.checkpoint.save, config.checkpoint.load) == ("elsewhere", "runs/x/checkpoints")
    assert config.logging.tensorboard_dir == "runs/x/tensorboard"
    assert config.logging.metrics_file == "runs/x/metrics.jsonl"


@pytest.mark.parametrize("name", ["--learning-rate", "--learning-rate=3", "--batch_size", "--max-steps"])
def test_other_programs_names_are_translated(name: str) -> None:
    with pytest.raises(ConfigError, match=r"this program's name for it is --(lr|global-batch-size|train-iters)$"):
        parse_pretrain_args([name, "3"])


def test_what_other_programs_flags_are_is_said_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse_pretrain_args(["--recompute-activations", "--lr", "1e-3", "--use_flash_attn", "--mtp-num-layers=2"])
    said = str(caught.value)
    assert "this program's name for it is --recompute-granularity selective" in said
    assert "--use-flash-attn is not an option here; leave it out" in said
    assert "--mtp-num-layers is Megatron-LM's, and not supported here: the model predicts the next token alone" in said


def test_no_foreign_name_is_one_of_ours() -> None:
    ours = {flag(name) for _, name in OPTIONS}
    ours |= {f"--no-{name.removeprefix('--')}" for name in ours}
    renamed, always_so, missing = foreign_flags().values()
    assert not ours & {*renamed, *always_so, *missing} and {words.split()[0] for words in renamed.values()} <= ours
    assert len({*renamed, *always_so, *missing}) == len(renamed) + len(always_so) + len(missing)
    for text in (*always_so.values(), *missing.values()):
        assert set(re.findall(r"--[a-z0-9-]+", text)) <= ours, text


def saved_before(**options: Any) -> dict[str, Any]:
    """A configuration as version 0.1 wrote it: whole, without the options that came later."""
    mapping = to_mapping(tiny_config("moe", **options))
    for name in ("moe_scale_output_init", "moe_router_init_method_std", "moe_aux_loss_group_size"):
        del mapping["moe"][name]
    return mapping


@pytest.mark.parametrize(("options", "width"), TABLE["widths"])
def test_experts_of_older_models_stay_as_wide_as_the_dense_mlp(options: dict[str, Any], width: int) -> None:
    assert from_mapping(upgrade(saved_before(**options)), "test").expert_ffn_size == width


def test_what_this_version_saved_is_not_touched() -> None:
    mapping = to_mapping(tiny_config("moe", moe_router_topk=2))
    assert upgrade(mapping) is mapping and from_mapping(mapping, "test").expert_ffn_size == 64


@pytest.mark.parametrize(
    "damage", [{"moe": None}, {"model": []}, {"model": {"hidden_size": "wide", "swiglu": True}}, {}]
)
def test_damaged_configurations_pass_through(damage: dict[str, Any]) -> None:
    upgrade({**saved_before(moe_router_topk=2), **damage})
