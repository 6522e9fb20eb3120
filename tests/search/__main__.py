"""Searches for a configuration whose training depends on its layout: python -m tests.search --minutes 60 --seed 1"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.search.case import Case, draw
from tests.search.trial import Verdict, shrunk, try_case

#: Of a case that agrees in fp64: rounding has turned a choice, or fp32 has a fault of its own.
FP32_ALONE = "differs in fp32 alone"


def search(minutes: float, seed: int, most_ranks: int, trial: Callable[[Case], Verdict] = try_case) -> list[Case]:
    """Tries cases until the time is over, at least one, prints what fails, and returns the faults, each with the fewest
    options."""
    end = time.monotonic() + 60 * minutes
    rng, found, refused = random.Random(seed), Counter[str](), Counter[str]()
    faults: list[Case] = []
    while not found or time.monotonic() < end:
        case = draw(rng, most_ranks, refused)
        if any(fault.is_part_of(case) for fault in faults):
            found["with a known fault"] += 1
            continue
        verdict = trial(case)
        if verdict.outcome == "refused":
            refused[verdict.words] += 1
        elif verdict.outcome == "differs" and trial(replace(case, precision="fp64")).outcome == "agrees":
            verdict = replace(verdict, outcome=FP32_ALONE)
            show(case, verdict)
        elif verdict.is_fault and trial(case).outcome != verdict.outcome:
            verdict = replace(verdict, outcome=f"{verdict.outcome}, once in two trials")
            faults.append(case)
            show(case, verdict)
        elif verdict.is_fault:
            faults.append(shrunk(case, lambda smaller, outcome=verdict.outcome: trial(smaller).outcome == outcome))
            show(faults[-1], trial(faults[-1]))
        found[verdict.outcome] += 1
    print(f"seed {seed}, {minutes:g} minutes, {sum(found.values())} cases: {counts(found)}\nrefused on the way:")
    for why, number in refused.most_common():
        print(f"{number:6d}  {why}")
    return faults


def counts(found: Counter[str]) -> str:
    """Returns numbers of outcomes in words."""
    return ", ".join(f"{number} {outcome}" for outcome, number in found.most_common())


def show(case: Case, verdict: Verdict) -> None:
    """Prints a verdict and the command that repeats it."""
    print(f"{verdict.outcome}: {verdict.words}\n  {case.command}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Searches, or repeats one case; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn")
    parser.add_argument("--ranks", type=int, default=8, help="most ranks of a layout")
    parser.add_argument("--replay", metavar="SPEC", help="try this case alone, as a failure prints it")
    args = parser.parse_args(argv)
    if args.replay is None:
        if args.ranks < 2 or not args.minutes > 0:
            parser.error("--ranks must be 2 or more, and --minutes above 0")
        return int(bool(search(args.minutes, args.seed, args.ranks)))
    case = Case.parse(args.replay)
    verdict = try_case(case)
    show(case, verdict)
    return int(verdict.is_fault)


if __name__ == "__main__":
    sys.exit(main())
