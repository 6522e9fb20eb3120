"""One self-contained HTML page about a set of runs: what they cost, how good they are, and what their experts did."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_samoe.evaluation import plots, plots_experts, plots_study, report_tables
from megatron_samoe.evaluation.measurements import DecodeTime, ZeroShot
from megatron_samoe.evaluation.plots_quality import BytesPerToken, at_a_glance, cost_axes, quality_against_cost
from megatron_samoe.evaluation.run_groups import Groups, group_runs
from megatron_samoe.evaluation.run_summary import RunSummary, Table
from megatron_samoe.parsing import JsonObject

STYLE = """:root{color-scheme:light}body{font:16px/1.55 system-ui,"DejaVu Sans",sans-serif;max-width:1100px;margin:0 auto;
padding:1rem;color:#1c2430;background:#fff}h1{font-size:1.6rem;margin:.6em 0 .2em}h2{font-size:1.2rem;margin:2em 0 .4em;
border-top:1px solid #d5dae1;padding-top:1em}nav{font-size:.9rem;margin:.6em 0 1em}nav a{margin-right:1em;color:#1f5fbf}
div.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #e2e6eb;white-space:nowrap}th{vertical-align:bottom;white-space:normal}
td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}p{max-width:75ch}p.how{color:#5b6675;
font-size:.9rem}p.sentence{font-size:1.05rem;max-width:none}div.beside{display:flex;flex-wrap:wrap;gap:1.5rem;
align-items:flex-start}div.beside img{flex:1 1 380px;min-width:0}
div.beside div.wide{flex:0 1 auto}
blockquote{border-left:3px solid #c9ced6;margin-left:0;padding-left:1em;white-space:pre-wrap}"""


@dataclass(frozen=True)
class ReportData:
    """What a report is made of beside the runs.

    Attributes:
        decode, zero_shot: of checkpoints in the runs' folders; others are left out.
        bytes_per_token: weights that decoding reads, by model and batch size.
        notes: paragraphs under the first table.
        samples: text per model.
        study: content of the results.json of the study that the runs belong to.
    """

    decode: Sequence[DecodeTime] = ()
    zero_shot: Sequence[ZeroShot] = ()
    bytes_per_token: BytesPerToken = field(default_factory=dict)
    notes: Sequence[str] = ()
    samples: Mapping[str, str] = field(default_factory=dict)
    study: JsonObject | None = None


#: A model is called as good as the best if its loss lies so near, in nats: rounding alone sets equal runs as far apart.
MARGIN = 0.02


@dataclass
class _Section:
    """A heading, a sentence that says it all, paragraphs on how to read what follows, a table, and a plot by the name of its
    file, beside the table where there is a sentence."""

    name: str
    heading: str
    paragraphs: list[str] = field(default_factory=list)
    table: Table = field(default_factory=list)
    png: bytes | None = None
    sentence: str = ""

    @property
    def is_empty(self) -> bool:
        return self.png is None and len(self.table) < 2


def write_report(
    path: Path,
    title: str,
    runs: Sequence[RunSummary],
    notes: Sequence[str] = (),
    samples: Mapping[str, str] | None = None,
) -> None:
    """Writes a report on runs alone; see `write_group_report`."""
    write_group_report(path, title, group_runs(runs), ReportData(notes=notes, samples=samples or {}))


def write_group_report(path: Path, title: str, groups: Groups, data: ReportData) -> None:
    """Writes the page, and each plot as a PNG beside it. What nobody measured has no section; the page says so."""
    sections = _sections(groups, data)
    shown = [section for section in sections if not section.is_empty]
    links = "".join(f'<a href="#{s.name}">{html.escape(s.heading)}</a> ' for s in shown)
    body = [f"<h1>{html.escape(title)}</h1>", f"<nav>{links}</nav>"]
    for section in shown:
        body += _render(section, path.parent)
    missing = [section.heading for section in sections if section.is_empty]
    if missing:
        body.append(
            f'<p class="how">Not in this report, as nothing was measured: {html.escape("; ".join(missing))}.</p>'
        )
    for name, text in data.samples.items():
        body.append(f"<h2>Sample of {html.escape(name)}</h2><blockquote>{html.escape(text)}</blockquote>")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style></head>'
    )
    path.write_text(f"{head}<body>{''.join(body)}</body></html>", encoding="utf-8")


def _render(section: _Section, folder: Path) -> list[str]:
    body = [f'<h2 id="{section.name}">{html.escape(section.heading)}</h2>']
    if section.sentence:
        body.append(f'<p class="sentence">{html.escape(section.sentence)}</p><div class="beside">')
    if len(section.table) > 1:
        body.append(_table(section.table))
    if section.png is not None:
        (folder / f"{section.name}.png").write_bytes(section.png)
        encoded = base64.b64encode(section.png).decode()
        body.append(f'<img alt="{html.escape(section.heading)}" src="data:image/png;base64,{encoded}">')
    body += ["</div>"] if section.sentence else []
    return body + [f'<p class="how">{html.escape(text)}</p>' for text in section.paragraphs]


def _table(rows: Table) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>'


def _glance(groups: Groups) -> _Section:
    several = any(len(group.runs) > 1 for group in groups)
    how = "Bars: standard deviation over seeds." if several else "One seed each."
    return _Section(
        "glance", "At a glance", [f"{how} Lower and further left is better. Active: parameters that a token meets."],
        report_tables.glance_table(groups), at_a_glance(groups), report_tables.glance_text(groups, MARGIN),
    )  # fmt: skip


def _results(groups: Groups, data: ReportData) -> _Section:
    several = any(len(group.runs) > 1 for group in groups)
    spread = "Losses are means over seeds ± their standard deviation (n - 1)." if several else "One seed of each model."
    text = f"{spread} A SaMoE's active parameters count combined experts, which is what a token meets. "
    if any(group.first.config.moe.shares_experts for group in groups):
        text += (
            "Experts that layers share are stored, and counted, once; a map names the set of each MoE layer in order. "
        )
    text += "Checkpoints hold the optimizer's state too, but for models that were made by editing others."
    if len({group.tokens for group in groups} - {"-"}) > 1:
        text += (
            " The models were trained on different numbers of tokens, so their losses do not compare the models alone."
        )
    return _Section("results", "All figures", [*data.notes, text], report_tables.results_table(groups))


def _quality(groups: Groups, data: ReportData) -> _Section:
    axes = cost_axes(groups, data.decode, data.bytes_per_token)
    paragraphs = [
        "Lower and further left is better. Two models at one place of a horizontal axis cost the same there; the vertical "
        "distance is what the cost buys. Models at one point lie within each other. Bars: standard deviation over seeds."
    ]
    if data.bytes_per_token:
        paragraphs.append(
            "Weights read per decoded token are counted, not measured: every weight that a step of the batch needs once, "
            "with the expected number of distinct experts of evenly routed tokens, divided by the batch; a SaMoE with "
            "its experts combined in memory reads as a MoE does."
        )
    if any("measured" in cost for cost in axes):
        paragraphs.append(
            "Milliseconds are medians of whole decoding steps (benchmark.py decode), divided by the batch; where several "
            "ways of serving were measured, the fastest's."
        )
    table, png = report_tables.cost_table(groups, axes), quality_against_cost(groups, axes)
    return _Section("quality", "Quality against cost", paragraphs, table, png)


def _study(study: JsonObject | None) -> list[_Section]:
    """Returns what a study of this version knows beside its runs."""
    if study is None or "size" not in study:
        return []
    how = (
        f"Differences from {study['baseline']} within seeds. A model whose whole interval lies in the grey band is as good for "
        "all that matters here; one whose interval holds 0 but leaves the band is merely not told apart."
    )
    return [
        _Section("differences", f"Differences from {study['baseline']}", [how], png=plots_study.differences(study)),
        _Section("lengths", "Loss over the length of training", png=plots_study.lengths(study)),
    ]


_SPEED = (
    "Median and quartiles of tokens per second over the logged intervals of all seeds, without each run's first, "
    "which warms up. A token counts once, forward and backward together. The time is the wall clock of "
    "whole steps, data loading and optimizer included; evaluation and saving are excluded. Models that ran at "
    "different times, or beside other programs, are not to be compared by it."
)
_ZERO_SHOT = (
    "± is the standard error from the number of items; with several seeds, the standard deviation over them. Where a "
    "model was evaluated at several nearby checkpoints, their mean, standard deviation and range stand beside the last "
    "one's value: a difference between models that is not larger than these is none. The constant answer is the best "
    "single choice for all items."
)
#: Plots of runs alone: name of the file, heading, how to read it, what draws it.
_PLOTS: tuple[tuple[str, str, str, Callable[[Groups], bytes | None]], ...] = (
    ("gradients_against_experts", "Gradient norm per expert against the number of experts",
     "A dot is a MoE layer (first layer left), the bar is the mean over layers: gradient norm of one expert before "
     "clipping, mean over the second half of training and over experts. For a SaMoE it is that of the combined expert.",
     plots_experts.gradients_against_experts),
    ("gradient_norms", "Gradient norm per expert and layer",
     "log10 of the norm in the last logged step, first seed; grey: no gradient, as no token came.", plots.gradient_norms),
    ("load_entropy", "Entropy of the expert load",
     "1 is an even load, 0 all tokens to one expert. Line: mean over layers and seeds; band: layers of the first seed.",
     plots_experts.load_entropies),
    ("expert_load", "Expert load per layer",
     "Share of the last logged step's tokens, relative to an even share (1), first seed.", plots.expert_load),
    ("combinations", "Learned combinations",
     "Weights of the pool's banks in each layer at the end, first seed; mean over experts where each has its own.",
     plots.combinations),
    ("combination_evolution", "Combinations over training",
     "A colour per bank; full lines: input projections (w1), dashed: output projections (w2). First seed.",
     plots_experts.combination_evolution),
)  # fmt: skip


def _sections(groups: Groups, data: ReportData) -> list[_Section]:
    losses = "Thin: training, every seed. Dots: validation, mean over seeds; bars: lowest and highest seed."
    return [
        _glance(groups), _results(groups, data), *_study(data.study), _quality(groups, data),
        _Section("speed", "Training speed", [_SPEED], report_tables.speed_table(groups)),
        _Section("loss_curves", "Loss curves", [losses], png=plots.loss_curves(groups)),
        _Section("zero_shot", "Zero-shot tasks", [_ZERO_SHOT], report_tables.zero_shot_table(groups, data.zero_shot)),
        *(_Section(name, heading, [text], png=draw(groups)) for name, heading, text, draw in _PLOTS),
    ]  # fmt: skip
