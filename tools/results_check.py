#!/usr/bin/env python3
"""Recomputes the figures of docs/results/README.md and the tables of other pages from what lies in docs/results, and compares the
store's runs with the registration.

    python tools/results_check.py              # the status is 1 where something differs
    python tools/results_check.py --write      # puts the store's figures into the pages first

How figures are marked is told in tools/results/page_figures.py.
"""

import sys
import tempfile
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests/extending/site"))  # a package that has a way of sharing

from megatron_samoe.evaluation.study.results_store import read_store  # noqa: E402
from tools.results.frontier import frontier  # noqa: E402
from tools.results.measured import measured_heads, rows_of, wrong_tables  # noqa: E402
from tools.results.model_table import OPTIMIZERS, losses_table, rates_table  # noqa: E402
from tools.results.page_figures import Models, Told, models_of, rewritten, with_table, wrong_figures  # noqa: E402
from tools.results.registration import deviations, kept_plan, read_registrations  # noqa: E402
from tools.results.result_plots import plots_of  # noqa: E402
from tools.results.scaling import scaling  # noqa: E402
from tools.results.verdicts import (  # noqa: E402
    compressed_figures,
    compressed_losses,
    foreign_originals,
    judge,
    known_figures,
    losses_on_test,
    verdict_table,
)

#: Pages, and of which of their figures something must be said.
PAGES: dict[str, Told] = {
    "README.md": "tables",
    "docs/results/README.md": "all",
    "docs/results/first_edition.md": "all",
}
for _name in "compression inference optimizers performance routing samoe sharing which_sharing".split():
    PAGES[f"docs/{_name}.md"] = "tables"


def main(write: bool) -> int:
    """Returns 1 where a figure, a run or a folder of the store is not as it should be, having said which."""
    folder = ROOT / "docs/results"
    registrations = read_registrations(folder / "registration.md", ROOT / "examples/studies")
    trained_on = {split: content for split, content in registrations[-1].data.items() if split != "test"}
    with tempfile.TemporaryDirectory() as place:
        first = kept_plan(folder / "first_edition.yaml", trained_on, folder / "store", Path(place) / "first")
        plans = {
            s.stem: kept_plan(s, registration.data, folder / registration.store, Path(place) / s.stem)
            for registration in registrations[::-1]  # the page has the newest first
            for s in registration.studies
        }
        models: Models = {}
        problems, num_runs = list[str](), 0
        for store in sorted({registration.store for registration in registrations}):
            runs, damaged = read_store(folder / store)
            own = [registration for registration in registrations if registration.store == store]
            own_plans = {s.stem: plans[s.stem] for registration in own for s in registration.studies}
            problems += damaged + deviations(own, own_plans, runs)
            # A run's key is that of the first store that has it.
            models = {**models_of({"": first, **own_plans} if store == "store" else own_plans, runs), **models}
            num_runs += len(runs)
        compressed = compressed_losses(folder / "compression")
        held_out = losses_on_test(plans, models, compressed)
        problems += foreign_originals(held_out)
        verdicts = list(judge(held_out))
        by_size, lengthened = scaling(held_out)
        of_one_size = {name: plan for name, plan in plans.items() if len(plan.study.sizes) == 1}
        tables = [verdict_table(verdicts), losses_table(models, held_out)]
        tables += [rates_table(of_one_size, models, optimizer) for optimizer in OPTIMIZERS]
        tables = [table for table in (*tables, by_size, frontier(models, held_out)) if table]
        known = (
            {"the repeat": rows_of("repeat")[-1]["validation_loss"]}
            | lengthened
            | known_figures(held_out, verdicts)
            | compressed_figures(compressed)
        )
        for name, plan in plans.items():
            every = plan.all_runs()
            print(f"{name}: {sum(map(plan.is_finished, every))} of {len(every)} runs are in the store")
        for claim in held_out.claims:
            if missing := [n for n in (*claim.models, *claim.waits_for) if n not in held_out.whole]:
                print(f"{claim.name} waits for {'; '.join(missing)}")
    for name, plot in plots_of(plans, models, held_out).items():
        if write and not plot.is_in(folder / name):
            plot.write(folder / name)
        problems += [] if plot.is_in(folder / name) else [f"{folder / name} shows something else than the store's runs"]
    heads = [table.partition("\n")[0] for table in tables]
    for name, told in PAGES.items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        if write:
            text = reduce(with_table, tables, rewritten(text, models, known))
            page.write_text(text, encoding="utf-8")
        found = wrong_figures(text, models, told, [*measured_heads(name), *heads], known) + wrong_tables(name, text)
        found += [f"the table {t[:20]!r} is not that of the store" for t in tables if with_table(text, t) != text]
        problems += [f"{name}, {problem}" for problem in found]
        heads = [head for head in heads if f"\n{head}\n" not in text]
    problems += [f"no page has the table {head[:20]!r}" for head in heads]
    print("\n".join(problems) or f"Every figure is that of the {num_runs} runs in {folder}, or of a benchmark's file.")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
