"""The search draws legal cases of every option, counts refusals apart, and shrinks a planted fault to what it needs."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from functools import partial

import pytest
import torch.distributed as dist

from megatron_samoe.config.option import all_options
from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.optimizer.param_groups import ParamRule, default_rules
from megatron_samoe.training.setup import Extensions
from tests.search.__main__ import main, search
from tests.search.case import BASE, LEFT_OUT, VALUES, Case, draw, drawn_options, grown, values_of
from tests.search.trial import try_case


def test_every_option_is_drawn_or_left_out_for_a_reason() -> None:
    names = {name for _, name, *_ in all_options(BASE)}
    groups = {group for group, *_ in all_options(BASE)}
    assert LEFT_OUT.keys() <= names | groups and VALUES.keys() <= drawn_options().keys(), "an option is gone"
    for name in drawn_options():
        values = values_of(name)
        assert values, name
        assert all(Case(2).changed(**{name: value}).config != BASE for value in values), name


def test_cases_are_legal_and_the_same_for_a_seed() -> None:
    first, again = ([draw(rng, 8, Counter()) for _ in range(5)] for rng in (random.Random(3), random.Random(3)))
    assert first == again and len({case.command for case in first}) == 5
    for case in first:
        assert not case.problems()
        assert Case.parse(shlex.split(case.command)[-1]) == case
        assert case.in_one_process.training.global_batch_size == case.config.training.global_batch_size
    assert len({name for case in first for name in case.options}) > 20


@pytest.mark.parametrize("name", ["q_lora_rank", "moe_router_num_groups", "pool_lock_anneal_steps", "yarn_beta_fast"])
def test_an_option_brings_what_it_needs(name: str) -> None:
    rng = random.Random(5)
    found = [grown(Case(4), name, rng, Counter()) for _ in range(8)]
    assert any(case is not None and name in case.options for case in found)


def forgets_the_world(config: OptimizerConfig) -> tuple[ParamRule, ...]:
    """A fault: several ranks learn at another rate than one."""
    return (*default_rules(config), *((ParamRule("", lr_mult=1.5),) if dist.is_initialized() else ()))


@pytest.mark.distributed
def test_a_refusal_at_the_start_is_none() -> None:
    """Names of parameters are known when the model is built, on all ranks."""
    verdict = try_case(Case(2, "fp32", {"lr_mult_patterns": ("nothing=0.5",)}))
    assert verdict.outcome == "refused" and not verdict.is_fault
    assert verdict.words.startswith("--lr-mult-patterns")


@pytest.mark.night
@pytest.mark.distributed
def test_a_search_prints_the_command_that_repeats_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    trial = partial(try_case, extensions=Extensions(rules=forgets_the_world))
    # A case may be refused before the fault is met, so one seed might not find it.
    faults = next(found for seed in range(9) if (found := search(1e-6, seed, 2, trial)))
    assert [(fault.ranks, fault.options) for fault in faults] == [(2, {})]
    shown = capsys.readouterr().out
    assert "cases: 1 differs\nrefused on the way:\n" in shown
    command = next(line for line in shown.splitlines() if line.startswith("  python -m tests.search"))
    assert main(shlex.split(command)[3:]) == 0, "it repeats the case, without what was planted"
    assert capsys.readouterr().out.startswith("agrees")
