"""Searches for a file that harms who reads it: python -m tests.hostile --minutes 10 --seed 1"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.hostile.formats import MAKERS, Case
from tests.hostile.trial import Trials


def search(
    trials: Trials,
    minutes: float,
    seed: int,
    is_wanted: Callable[[Case], bool] = lambda case: True,
    most: int | None = None,
) -> list[str]:
    """Tries cases until the time is over, or so many, prints each kind of fault once, and returns them as printed."""
    found, faults = Counter[str](), dict[str, str]()
    end = time.monotonic() + 60 * minutes
    cases = filter(is_wanted, map(Case, itertools.repeat(seed), itertools.count()))
    for case in itertools.islice(cases, most):
        if time.monotonic() > end:
            break
        fault, ended = trials(case)
        found["at fault" if fault else "refused" if ended.status else "accepted"] += 1
        kind = f"{case.drawn[0].format} {re.sub(r'[0-9]+', 'N', fault.replace(str(trials.root), ''))[:80]}"
        if fault and kind not in faults:
            faults[kind] = f"{fault}\n  {case}"
            print(faults[kind], flush=True)
    print(f"seed {seed}, {found.total()} cases: {', '.join(f'{n} {what}' for what, n in found.most_common())}")
    return list(faults.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Searches, or repeats one case; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn")
    parser.add_argument("--format", choices=MAKERS, action="append", help="only files of this kind")
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="try this case alone, as a failure prints it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        if args.replay is None:
            formats = args.format or MAKERS
            return int(bool(search(trials, args.minutes, args.seed, lambda case: case.drawn[0].format in formats)))
        case = Case(*map(int, args.replay.split(":")))
        fault, end = trials(case)
    print(f"{case}\n{end.output}\nstatus {end.status}, {end.growth_mb:,.0f} MB: {fault or 'all is well'}")
    return int(bool(fault))


if __name__ == "__main__":
    sys.exit(main())
