"""A report's numbers by hand, what it takes from other commands' files, and the page itself in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.cli import report as report_command
from megatron_samoe.convert.edited_model import NOT_MODEL
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader
from megatron_samoe.errors import CheckpointError, ConfigError, DataError
from megatron_samoe.evaluation.measurements import read_decode, read_study, read_zero_shot
from megatron_samoe.evaluation.plots_quality import cost_axes
from megatron_samoe.evaluation.report import ReportData, write_group_report
from megatron_samoe.evaluation.report_tables import (
    cost_table,
    glance_table,
    glance_text,
    results_table,
    speed_table,
    zero_shot_table,
)
from megatron_samoe.evaluation.run_groups import RunGroup, group_runs, mean_sd
from megatron_samoe.evaluation.run_summary import RunSummary, perplexity_text, read_run
from tests.harness.serving import save_tiny
from tests.harness.tables import table

TABLE = table(__file__)


def write_metrics(folder: Path, loss: float, experts: bool, banks: bool) -> None:
    lines = []
    for i in range(1, 5):
        record: dict[str, Any] = {"iteration": i, "consumed_tokens": 100 * i, "lm_loss": loss + 1 / i}
        record |= {"tokens_per_s": 100.0 * (10 + (i > 1) * i), "peak_memory_bytes": 10**6 * i}
        if i % 2 == 0:
            record |= {"validation_loss": loss + 1 / i, "validation_perplexity": math.exp(loss + 1 / i)}
        if experts:
            record["least_load_entropy"] = loss / 3 + i / 100
            record["expert_load"] = [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]
            record["expert_grad_norm"] = [[float(i)] * 4, [0.0, 0.0, 2.0 * i, 2.0 * i]]
        if banks:
            record["combination"] = [[[[1.0, 0.1 * i]], [[0.0, 1.0]]]] * 2
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, layout in (("moe", "moe"), ("samoe", "samoe"), ("dense", "dense")):
        save_tiny(root / name / "seed-1" / "checkpoints", layout)
        shutil.copytree(root / name / "seed-1", root / name / "seed-2")
        for seed in (1, 2):
            write_metrics(root / name / f"seed-{seed}", 2.0 + 0.2 * seed, layout != "dense", layout == "samoe")
    # A derived model: evaluated, never trained.
    save_tiny(root / "samoe one bank" / "checkpoints", "samoe")
    line = {"iteration": 4, "validation_loss": 2.75, "validation_perplexity": math.exp(2.75)}
    (root / "samoe one bank" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    machine = {"device": "cpu", "device_name": "A processor", "threads_per_rank": 2, "ranks": 4}
    machine["layout"] = {"tensor": 2, "data": 1}
    (root / "moe" / "seed-2" / "machine.json").write_text(json.dumps(machine))
    return root


def folders(runs_dir: Path) -> list[Path]:
    return [*sorted(runs_dir.glob("*/seed-*")), runs_dir / "samoe one bank"]


@pytest.fixture(scope="module")
def groups(runs_dir: Path) -> list[RunGroup]:
    return group_runs([read_run(path) for path in folders(runs_dir)])


def decode_rows(runs_dir: Path) -> list[dict[str, Any]]:
    common = {"dtype": "fp32", "floor_ms": 0.1, "read_mb": 2.0}
    moe = str(runs_dir / "moe/seed-1/checkpoints")
    return [
        {**common, "contestant": f"{moe} auto", "serving": "folded", "batch": 1, "ms_per_token": 0.5},
        {**common, "contestant": f"{moe} folded", "serving": "folded", "batch": 32, "ms_per_token": 3.2},
        {**common, "contestant": "llama.cpp", "serving": "", "batch": 1, "ms_per_token": 0.7},
    ]


def zero_shot_file(checkpoints: Path, values: tuple[float, ...]) -> dict[str, Any]:
    def run(step: int, acc: float) -> dict[str, Any]:
        metrics = {"acc": {"value": acc, "stderr": 0.05, "units": 100}}
        result = {"task": "boolq", "items": 100, "best_constant": 0.62, "metrics": metrics}
        return {"name": f"iter_{step}", "checkpoint": str(checkpoints / f"iter_{step}"), "results": [result]}

    content: dict[str, Any] = {"runs": [run(i, v) for i, v in enumerate(values)]}
    if len(values) > 1:
        content["variation"] = [{"task": "boolq", "metric": "acc", "values": list(values)}]
    return content


def page_of(folder: Path, runs: list[RunSummary], title: str = "Runs", data: ReportData | None = None) -> str:
    write_group_report(folder / "r.html", title, group_runs(runs), data or ReportData())
    return (folder / "r.html").read_text()


def test_folders_of_seeds_are_one_model(runs_dir: Path, groups: list[RunGroup]) -> None:
    assert [(g.name, len(g.runs)) for g in groups] == [("dense", 2), ("moe", 2), ("samoe", 2), ("samoe one bank", 1)]
    loss = groups[1].loss
    assert loss.mean == pytest.approx(2.55) and loss.sd == pytest.approx(0.2 / math.sqrt(2)) and loss.count == 2
    assert loss.text(3) == "2.550 ± 0.141" and mean_sd([1.5]).text(1) == "1.5"
    assert groups[1].contains(runs_dir / "moe/seed-2/checkpoints/iter_1") and not groups[1].contains(runs_dir / "samoe")
    assert groups[0].expert_layout == "dense" and groups[2].expert_layout == "samoe"


def test_runs_of_one_name_stay_apart(runs_dir: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(runs_dir / "moe/seed-1", tmp_path / parent / "moe")
        shutil.copytree(runs_dir / "moe/seed-1", tmp_path / parent / "samoe" / "seed-1")
    for name in ("moe", "samoe/seed-1"):
        groups = group_runs([read_run(tmp_path / parent / name) for parent in ("a", "b")])
        assert [(g.name, len(g.runs)) for g in groups] == [(f"{p}/{name.split('/')[0]}", 1) for p in ("a", "b")]


def test_a_run_is_not_two_seeds(runs_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "seed-2").symlink_to(runs_dir / "moe/seed-1")
    runs = [read_run(path) for path in (runs_dir / "moe/seed-1", tmp_path / "seed-2")]
    with pytest.raises(ConfigError, match="given twice"):
        group_runs(runs)


def test_a_half_written_line_is_left_out_and_a_broken_one_refused(runs_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs_dir / "moe/seed-1", run)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"iteration": 5, "lm_l')
    assert len(read_run(run).records) == 4
    for broken in ('{"iteration": 0, "lm_l\n' + whole, whole + "7\n"):
        (run / "metrics.jsonl").write_text(broken)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:[15] is not a record"):
            read_run(run)


@pytest.mark.parametrize(
    "content", ['{"device": "cpu", "ra', "[]", '{"device": "cpu"}', '{"layout": {"tensor": "2"}}', "[" * 100_000]
)
def test_a_broken_record_of_the_machine_is_named(content: str, runs_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs_dir / "moe/seed-2", run)
    assert read_run(run).machine["ranks"] == 4
    (run / "machine.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"machine\.json .*without it the report can be made"):
        read_run(run)


def test_perplexities_of_any_size() -> None:
    losses = (2.0, 14.5, 710.0, math.inf, math.nan)
    assert [perplexity_text(loss) for loss in losses] == ["7.39", "1.98e+06", "inf", "inf", "nan"]


def test_different_numbers_of_training_tokens_are_noted(runs_dir: Path, tmp_path: Path) -> None:
    runs = [read_run(runs_dir / name) for name in ("dense/seed-1", "moe/seed-1", "samoe one bank")]
    runs[0] = replace(runs[0], records=[*runs[0].records[:1], {**runs[0].records[1], "consumed_tokens": 2_000_000}])
    assert [row[2] for row in results_table(group_runs(runs))] == ["training tokens", "2.00 M", "0.00 M", "-"]
    for chosen, noted in ((runs, True), (runs[1:], False)):
        page = page_of(tmp_path, chosen)
        assert ("trained on different numbers of tokens" in page) == noted
        assert "<th>sharing</th>" in page and "stored, and counted, once" in page


#: Ways of sharing, how a report names them for four layers, and the sets of experts that are stored.
WAYS = TABLE["ways"]


def test_every_way_of_sharing_is_named_and_its_parameters_counted_once(tmp_path: Path) -> None:
    for number, way in enumerate(WAYS):
        save_tiny(tmp_path / f"{number}" / "checkpoints", "moe", num_layers=4, expert_sharing=way)
        write_metrics(tmp_path / f"{number}", 2.0, True, False)
    groups = group_runs([read_run(tmp_path / f"{number}") for number in range(len(WAYS))])
    head, *rows = results_table(groups)
    assert [row[head.index("sharing")] for row in rows] == [name for name, _ in WAYS.values()]
    one_set = groups[0].first.parameters.expert // 4
    for group, (_, num_sets) in zip(groups, WAYS.values(), strict=True):
        count = group.first.parameters
        assert count.expert == num_sets * one_set, group.name
        (folder,) = (tmp_path / group.name / "checkpoints").glob("iter_*")
        stored = CheckpointReader(folder).tensors
        of_model = [t for name, t in stored.items() if not name.startswith(NOT_MODEL)]
        assert count.total == sum(t.num_elements for t in of_model), group.name
        # Beside all that is no routed expert, a token passes K experts in each of the four layers.
        assert count.active == count.total - count.expert + 4 * one_set // 4, group.name


def test_large_costs_are_whole_numbers(groups: list[RunGroup]) -> None:
    for value, text in ((1300.4, "1,300"), (0.01234, "0.0123"), (999.7, "1,000"), (12.34, "12.3")):
        assert cost_table(groups[1:2], {"total parameters (M)": {"moe": value}})[1][1] == text


def test_tables_have_the_figures_of_the_records(groups: list[RunGroup]) -> None:
    head, *rows = results_table(groups)
    results = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    shown = ("valid. loss", "load entropy", "peak memory/rank")
    assert [results["moe"][name] for name in shown] == ["2.5500 ± 0.1414", "0.77", "4 MB"]
    assert [results["samoe one bank"][name] for name in shown] == ["2.7500", "-", "-"]
    assert results["dense"]["load entropy"] == "-"
    speeds = {row[0]: row for row in speed_table(groups)}
    # Without each start's first interval: 1,200, 1,300, 1,400, for both seeds.
    assert speeds["moe"][1:4] == ["1,300", "1,225 to 1,375", "6"]
    assert speeds["moe"][4:7] == ["A processor, cpu", "4 x 2", "tensor 2"]
    assert speeds["samoe"][4:7] == ["not recorded"] * 3 and "samoe one bank" not in speeds


def test_speed_of_a_machine_that_something_else_used_is_left_out(runs_dir: Path, tmp_path: Path) -> None:
    moe, dense = (read_run(runs_dir / f"{name}/seed-1") for name in ("moe", "dense"))
    speeds = zip(moe.records, (900, 1000, 1000, 1900), strict=True)
    runs = [replace(moe, records=[{**record, "tokens_per_s": speed} for record, speed in speeds]), dense]
    assert speed_table(group_runs(runs)) == []
    assert "Not in this report: Training speed. Quartiles" in page_of(tmp_path, runs)


def test_the_first_screen_names_the_best_and_the_smallest_as_good(groups: list[RunGroup]) -> None:
    (edited,) = (group for group in groups if group.name == "samoe one bank")  # worse, and no smaller
    assert glance_table(groups)[1][:3] == ["dense", groups[0].loss.text(4), "+0.0000"]
    said = glance_text(groups, 1.0)
    assert (
        said.startswith("Best: dense, ")
        and "No smaller model" in said
        and said.endswith(f"larger ones do: {', '.join(group.name for group in groups[1:])}.")
    )
    records = [{"iteration": 4, "validation_loss": 2.0}]
    better = replace(groups[1], runs=tuple(replace(run, records=records) for run in groups[1].runs))
    said = glance_text([groups[0], better, edited], margin=0.6)
    assert said.startswith(f"Best: {better.name}, 2.0000") and "within 0.6 of it: dense, +0.5500" in said
    assert "No smaller model comes within 0.5 of it" in glance_text([groups[0], better, edited], margin=0.5)


def test_no_plot_compares_one_model_with_itself(runs_dir: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, [read_run(runs_dir / "moe/seed-1")])
    assert not (tmp_path / "quality.png").exists() and not (tmp_path / "glance.png").exists()
    assert "Best:" not in page and "Right, from" not in page and "further left" not in page


def test_costs_per_decoded_token(runs_dir: Path, groups: list[RunGroup], tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text(json.dumps(decode_rows(runs_dir)))
    read = report_command.bytes_per_token(groups)
    axes = cost_axes(groups, read_decode(tmp_path / "decode.json"), read)
    assert axes["measured ms per decoded token, batch 1, fp32"] == {"moe": 0.5}
    assert axes["measured ms per decoded token, batch 32, fp32"] == {"moe": 0.1}
    # One token reads what is active but the embedding's other rows; more tokens share the reading.
    active = groups[1].first.parameters.active
    assert 0.5 * 4 * active < read["moe"][1] < 4 * active and read["moe"][32] < 0.2 * read["moe"][1]
    assert read["samoe"][1] == pytest.approx(read["moe"][1], rel=0.01)


def test_zero_shot_results_vary_over_checkpoints_and_seeds(
    runs_dir: Path, groups: list[RunGroup], tmp_path: Path
) -> None:
    rows = []
    for seed, values in ((1, (0.6, 0.7)), (2, (0.5, 0.8))):
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps(zero_shot_file(runs_dir / f"moe/seed-{seed}/checkpoints", values)))
        rows += read_zero_shot(path)
    path = tmp_path / "samoe.json"
    path.write_text(json.dumps(zero_shot_file(runs_dir / "samoe/seed-1/checkpoints", (0.65,))))
    rows += read_zero_shot(path)
    _, moe, samoe = zero_shot_table(groups, rows)
    assert moe == ["boolq", "acc", "moe", "100", "75.00 ± 7.07", "2: 65.00", "14.14", "50.00 to 80.00", "2", "62.00"]
    assert samoe == ["", "acc", "samoe", "100", "65.00 ± 5.00", "-", "-", "-", "1", "62.00"]


@pytest.mark.parametrize("metric, constant", [("acc_per_answer", 62.0), ("acc_norm", 62.0), ("f1a", None)])
def test_the_constant_answer_stands_beside_every_share_of_items(
    metric: str, constant: float | None, runs_dir: Path, tmp_path: Path
) -> None:
    content = json.dumps(zero_shot_file(runs_dir / "moe/seed-1/checkpoints", (0.6,))).replace('"acc"', f'"{metric}"')
    (tmp_path / "a.json").write_text(content)
    (row,) = read_zero_shot(tmp_path / "a.json")
    assert (row.metric, row.constant) == (metric, constant)


@pytest.mark.parametrize("content", ["", "[", "[1]", "{}", '[{"serving": "folded"}]', '{"runs": []}', "null"])
def test_files_of_another_kind_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    for read in (read_decode, read_zero_shot, read_study):
        if (read, content) == (read_decode, "{}"):
            continue  # no rows: nothing was measured
        with pytest.raises(DataError, match=r"a\.json"):
            read(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_decode(tmp_path / "missing.json")


def test_the_command_refuses_what_does_not_belong(runs_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "decode.json").write_text(json.dumps(decode_rows(tmp_path)))
    for words, status, part in TABLE["refused"]:
        args = [word.format(moe=runs_dir / "moe/seed-1", root=tmp_path) for word in words.split()]
        assert report_command.main(["--output", str(tmp_path / "r.html"), *args]) == status
        assert part in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(CheckpointError):
        read_run(tmp_path)


def test_a_study_is_reported_under_its_names(runs_dir: Path, tmp_path: Path, capsys: Any) -> None:
    variants = [
        {"name": "experts of their own", "directories": [str(runs_dir / f"moe/seed-{s}") for s in (1, 2)]},
        {"name": "one bank", "directories": [str(runs_dir / "samoe one bank")]},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"title": "A study", "variants": variants}))
    assert report_command.main(["--study", str(tmp_path / "results.json"), "--output", str(tmp_path / "r.html")]) == 0
    assert "experts of their own" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert "<h1>A study</h1>" in page and "one bank" in page and "Not in this report" in page


def test_texts_are_escaped_and_the_page_is_alone(runs_dir: Path, tmp_path: Path) -> None:
    runs = [read_run(runs_dir / "moe/seed-1"), read_run(runs_dir / "samoe one bank")]
    data = ReportData(notes=["<script>alert(1)</script>"], samples={"moe": "<b>bold</b>"})
    page = page_of(tmp_path, runs, "A < B & C", data)
    assert "A &lt; B &amp; C" in page and "<script" not in page and "&lt;b&gt;bold" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert (tmp_path / "loss_curves.png").read_bytes()[:4] == b"\x89PNG"


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


def test_optimizer_and_rate_stand_beside_the_loss(tmp_path: Path) -> None:
    runs = [run(tmp_path / "adam", "moe", lr=3e-4), run(tmp_path / "muon", "moe", optimizer="muon", lr=0.002)]
    derived = replace(run(tmp_path / "derived", "moe"), records=[{"iteration": 4, "validation_loss": 2.5}])
    head, *rows = results_table(group_runs([*runs, derived]))
    assert [row[head.index("optimizer, rate")] for row in rows] == ["adam, 0.0003", "muon, 0.002", "-"]


def test_a_page_of_all_that_was_measured(runs_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """tests/unit/test_pages.py opens one in a browser."""
    (tmp_path / "decode.json").write_text(json.dumps(decode_rows(runs_dir)))
    (tmp_path / "zs.json").write_text(json.dumps(zero_shot_file(runs_dir / "moe/seed-1/checkpoints", (0.6, 0.7))))
    flags = ["--decode", str(tmp_path / "decode.json"), "--zero-shot", str(tmp_path / "zs.json")]
    output = tmp_path / "report" / "r.html"
    assert report_command.main([*map(str, folders(runs_dir)), *flags, "--output", str(output)]) == 0
    page = output.read_text()
    targets = re.findall(r'href="#([^"]+)"', page[page.index("<nav") : page.index("</nav")])
    assert page.count("<img ") == 8 and len(targets) == 11 and all(f'id="{name}"' in page for name in targets)
    assert "gradients_against_experts" not in targets, "all have as many experts"
    runs = [run(tmp_path / f"of {count}", "moe", num_experts=count) for count in (2, 4)]
    assert "Gradient norm per expert against" in page_of(tmp_path, runs), "these have not"
