"""What is a flag without a value in Megatron-LM is one here."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_samoe.config.cli import parse, parse_pretrain_args
from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.parsing import parse_yaml

LISTED = frozenset(parse_yaml((Path(__file__).resolve().parents[3] / "docs/megatron.yaml").read_text())["same"])
#: Those that Megatron-LM's own parser stores as true or false: a value after them is an error there.
WITHOUT_VALUE = frozenset(
    f"--{name}"
    for name in (
        "add-qkv-bias async-save bf16 deterministic-mode disable-bias-linear eod-mask-loss exit-on-missing-checkpoint finetune "
        "fp16 full-validation group-query-attention log-progress mock-data moe-per-layer-logging moe-router-enable-expert-bias "
        "moe-router-pre-softmax moe-shared-expert-gate moe-shared-expert-overlap multi-latent-attention muon-use-nesterov "
        "no-load-optim no-load-rng no-mmap-bin-files no-save-optim overlap-grad-reduce profile qk-layernorm "
        "reset-attention-mask reset-position-ids sequence-parallel skip-train swiglu untie-embeddings-and-output-weights "
        "use-checkpoint-args use-distributed-optimizer"
    ).split()
)
OPTIONS = {flag(name): (group, name) for group, name, *_ in all_options(PretrainConfig())}


def booleans() -> set[str]:
    """Returns the options that are true or false, or derived until they are."""
    config = PretrainConfig()
    hints = {name: get_type_hints(type(getattr(config, group)))[name] for group, name in OPTIONS.values()}
    return {flag(name) for name, hint in hints.items() if hint is bool or bool in get_args(hint)}


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
