"""The trial of a case, a layout against one process, and the shrinking of one that fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.training.setup import Extensions
from tests.harness.layout_training import assert_same, train
from tests.harness.ranks import RankFailure, run_ranks
from tests.search.case import Case, drawn_options, reason

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
BOUNDS = {"fp32": 1e-5, "fp64": 1e-11}
#: Of one training; tiny models take seconds, also of eight ranks on two cores.
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        outcome: agrees; refused: by a rule, or at the start; differs: from one process; else the class of an exception, or
            that a rank died or hung.
        words: why.
    """

    outcome: Literal["agrees", "refused", "differs"] | str
    words: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether somebody should look into it."""
        return self.outcome not in ("agrees", "refused")


def try_case(case: Case, extensions: Extensions | None = None) -> Verdict:
    """Trains a case in its layout and in one process and compares.

    Args:
        extensions: what comes from outside the package.
    """
    for problem in case.problems():
        return Verdict("refused", reason(problem))
    found = []
    for config, ranks in ((case.in_one_process, 1), (case.config, case.ranks)):
        try:
            found.append(run_ranks(train_or_refuse, ranks, config, case.precision, extensions, timeout_s=TIMEOUT_S)[0])
        except RankFailure as failure:
            *_, last = str(failure).strip().splitlines()
            return Verdict(re.sub(r"ranks? [\d\[\], ]+", "a rank ", last.partition(":")[0]), str(failure))
        if isinstance(found[-1], Verdict):
            return found[-1]
    expected, actual = found
    try:
        assert_same(actual, expected, BOUNDS[case.precision])
    except AssertionError as error:
        return Verdict("differs", str(error))
    return Verdict("agrees")


def train_or_refuse(
    config: PretrainConfig, precision: str, extensions: Extensions | None
) -> dict[str, Any] | Verdict | None:
    """Returns, on the first rank, what `train` does, or the refusal with which its start ended."""
    # A schedule of routing ends within five steps; else the third is the first to meet weights that moments made.
    steps = 5 if config.moe.pool_lock_step is not None or config.moe.neighbour_unmask_steps else 3
    exchange = config.parallel.moe_all_to_all_backend
    try:
        found = train(config, DTYPES[precision], steps, exchange=exchange, extensions=extensions)
    except ConfigError as error:
        return Verdict("refused", reason(error))
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


def shrunk(case: Case, still_fails: Callable[[Case], bool]) -> Case:
    """Returns the smallest part of a failing case that still fails, as far as leaving out one thing after the other finds it."""
    while True:
        for smaller in _smaller(case):
            if still_fails(smaller):
                case = smaller
                break
        else:
            return case


def _smaller(case: Case) -> Iterator[Case]:
    """Yields the case with less: first much less, so that few trials do where most has nothing to do with the fault."""
    groups = drawn_options()
    for group in dict.fromkeys(groups[name] for name in case.options):
        names = [name for name in case.options if groups[name] == group]
        if len(names) > 1:
            yield case.without(*names)
    for ranks in (1, 2, 3, 4, 6):
        if ranks < case.ranks:
            yield replace(case, ranks=ranks)
    for name in case.options:
        yield case.without(name)
