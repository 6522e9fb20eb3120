#!/usr/bin/env python3
"""Recomputes the figures of docs/results/README.md from docs/results/store, and compares its runs with the registration.

    python tools/results_check.py              # the status is 1 where something differs
    python tools/results_check.py --write      # puts the store's figures into the page first

How figures are marked is told in megatron_samoe/evaluation/study/page_figures.py.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_samoe.evaluation.study.page_figures import models_of, rewritten, wrong_figures  # noqa: E402
from megatron_samoe.evaluation.study.registration import deviations, kept_plan, read_registration  # noqa: E402
from megatron_samoe.evaluation.study.results_store import read_store  # noqa: E402


def main(folder: Path, write: bool) -> int:
    """Returns 1 where a figure, a run or a folder of the store is not as it should be, having said which."""
    registration = read_registration(folder / "registration.md", ROOT / "examples/studies")
    runs, problems = read_store(folder / "store")
    trained_on = {split: content for split, content in registration.data.items() if split != "test"}
    with tempfile.TemporaryDirectory() as place:
        first = kept_plan(folder / "first_edition.yaml", trained_on, folder / "store", Path(place) / "first")
        plans = {
            s.stem: kept_plan(s, registration.data, folder / "store", Path(place) / s.stem)
            for s in registration.studies
        }
        problems += deviations(registration, plans, runs)
        models = models_of({"": first, **plans}, runs)
    page = folder / "README.md"
    if write:
        page.write_text(rewritten(page.read_text(encoding="utf-8"), models), encoding="utf-8")
    problems += [f"{page}, {text}" for text in wrong_figures(page.read_text(encoding="utf-8"), models)]
    print("\n".join(problems) or f"{page}: every figure is that of the {len(runs)} runs in {folder / 'store'}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(ROOT / "docs/results", "--write" in sys.argv[1:]))
