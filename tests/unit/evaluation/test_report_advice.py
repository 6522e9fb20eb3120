"""What a report lacks is said with the flag that measures it, and what trained a model stands beside its loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli.init import _shown
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.evaluation.report_tables import results_table
from megatron_samoe.evaluation.run_groups import group_runs
from megatron_samoe.evaluation.run_summary import RunSummary, read_run
from tests.harness.serving import save_tiny
from tests.unit.evaluation.test_report import page_of


def run(folder: Path, layout: str, experts: bool = False, **options: object) -> RunSummary:
    save_tiny(folder / "checkpoints", layout, **options)
    record: dict[str, Any] = {"iteration": 4, "consumed_tokens": 400, "lm_loss": 2.5, "validation_loss": 2.5}
    if experts:
        record |= {"expert_load": [[0.25] * 4] * 2, "expert_grad_norm": [[1.0] * 4] * 2}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return read_run(folder)


def test_what_was_not_measured_names_the_flag(tmp_path: Path) -> None:
    moe = run(tmp_path / "moe", "moe")
    page = page_of(tmp_path, [moe])
    lacking = page[page.index("Expert load per layer") :]
    assert "No run was made with --moe-per-layer-logging, which measures them." in lacking
    assert "Zero-shot tasks. megatron-samoe evaluate --json FILE measures them" in page
    assert "Learned combinations" not in page, "a MoE has none, whatever is measured"
    page = page_of(tmp_path, [moe, run(tmp_path / "samoe", "samoe")])
    assert "Learned combinations" in page
    assert "--moe-per-layer-logging" not in page_of(tmp_path, [run(tmp_path / "dense", "dense")])
    measured = page_of(tmp_path, [run(tmp_path / "measured", "moe", experts=True)])
    assert "--moe-per-layer-logging" not in measured and 'id="expert_load"' in measured


@pytest.mark.parametrize("layout", ["samoe", "moe", "dense"])
def test_a_new_project_measures_them(layout: str) -> None:
    logging = _shown(layout, 100_000)["logging"]
    assert logging.get("moe_per_layer_logging") is (None if layout == "dense" else True)
    shown = _shown(layout, 100_000).items()
    given = {group: {k: value for k, value in options.items() if value is not None} for group, options in shown}
    assert from_mapping(given, "config.yaml").logging.moe_per_layer_logging == (layout != "dense")


def test_optimizer_and_rate_stand_beside_the_loss(tmp_path: Path) -> None:
    runs = [run(tmp_path / "adam", "moe", lr=3e-4), run(tmp_path / "muon", "moe", optimizer="muon", lr=0.002)]
    derived = replace(run(tmp_path / "derived", "moe"), records=[{"iteration": 4, "validation_loss": 2.5}])
    head, *rows = results_table(group_runs([*runs, derived]))
    assert [row[head.index("optimizer, rate")] for row in rows] == ["adam, 0.0003", "muon, 0.002", "-"]
