#!/usr/bin/env python3
"""Makes docs/results/shared_pool's report, and its pictures, again from the first edition's runs in the store.

python -m tools.pages.results_report
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from megatron_samoe.cli.report import bytes_per_token
from megatron_samoe.evaluation.report import ReportData, write_group_report
from megatron_samoe.evaluation.run_groups import RunGroup
from megatron_samoe.evaluation.study.results_store import read_store
from tools.results.page_figures import models_of
from tools.results.registration import kept_plan, read_registrations

ROOT = Path(__file__).resolve().parents[2]
#: Models as the page of results names them.
NAMES = {"samoe": "SaMoE", "l2": "SaMoE, L2", "moe8": "MoE of 8", "moe32": "MoE of 32", "dense": "dense"}
NAMES["select"] = "SaMoE, one bank"


def main() -> None:
    """Writes the page, and those of its pictures that the folder has."""
    folder = ROOT / "docs/results"
    registration = read_registrations(folder / "registration.md", ROOT / "examples/studies")[-1]
    trained_on = {split: content for split, content in registration.data.items() if split != "test"}
    runs, _ = read_store(folder / "store")
    study = json.loads((folder / "shared_pool/results.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        plan = kept_plan(folder / "first_edition.yaml", trained_on, folder / "store", Path(place) / "plan")
        models = models_of({"": plan}, runs)
        groups = [RunGroup(shown, tuple(models[name].values())) for name, shown in NAMES.items()]
        data = ReportData(study=study, bytes_per_token=bytes_per_token(groups))
        write_group_report(Path(place) / "report.html", study["title"], groups, data)
        for made in Path(place).glob("*.*"):
            if (kept := folder / "shared_pool" / made.name).exists():
                kept.write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
