"""The page about a set of runs: what they cost, how good they are, and what their experts did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_samoe.evaluation import plots, plots_experts, plots_study, report_tables
from megatron_samoe.evaluation.measurements import DecodeTime, ZeroShot
from megatron_samoe.evaluation.page import Section, write_page
from megatron_samoe.evaluation.plots_quality import BytesPerToken, at_a_glance, cost_axes, quality_against_cost
from megatron_samoe.evaluation.run_groups import Groups
from megatron_samoe.parsing import JsonObject


@dataclass(frozen=True)
class ReportData:
    """The parts of a report, except the runs.

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


#: A model is called as good as the best if its loss is within this of the best, in nats: rounding sets equal runs as far apart.
MARGIN = 0.02


def write_group_report(path: Path, title: str, groups: Groups, data: ReportData) -> None:
    """Writes the page, and each plot as a PNG next to it. What nobody measured has no section; the page says so."""
    write_page(path, title, _sections(groups, data), data.samples)


def _glance(groups: Groups) -> Section:
    several = any(len(group.runs) > 1 for group in groups)
    how = "Bars: standard deviation over seeds." if several else "One seed each."
    how += " Lower and further left is better." if len(groups) > 1 else ""
    return Section(
        "glance",
        "At a glance",
        [f"{how} Active: parameters that a token meets."],
        report_tables.glance_table(groups),
        at_a_glance(groups),
        report_tables.glance_text(groups, MARGIN),
    )


def _results(groups: Groups, data: ReportData) -> Section:
    several = any(len(group.runs) > 1 for group in groups)
    spread = "Losses are means over seeds ± their standard deviation (n - 1)." if several else "One seed of each model."
    text = f"{spread} A SaMoE's active parameters count combined experts, which is what a token meets. "
    if any(group.first.config.moe.shares_experts for group in groups):
        text += (
            "Experts that layers share are stored, and counted, once; a map names the set of each MoE layer in order. "
        )
    text += "Bits per byte of the validation set's text compare models of different tokenizers. "
    text += "Checkpoints hold the optimizer's state too, except of models that were made by editing others."
    if len({group.tokens for group in groups} - {"-"}) > 1:
        text += " The models were trained on different numbers of tokens, so their losses compare more than the models."
    return Section("results", "All figures", [*data.notes, text], report_tables.results_table(groups))


def _quality(groups: Groups, data: ReportData) -> Section:
    axes = cost_axes(groups, data.decode, data.bytes_per_token)
    paragraphs = []
    if len(groups) > 1:
        paragraphs.append(
            "Lower and further left is better. Two models at one position of a horizontal axis cost the same there; the vertical "
            "distance is what the cost buys. Models at one point lie within each other. Bars: standard deviation over seeds."
        )
    if data.bytes_per_token:
        paragraphs.append(
            "Weights read per decoded token are counted, not measured: every weight that a step of the batch needs once, "
            "with the expected number of distinct experts of evenly routed tokens, divided by the batch; a SaMoE with "
            "its experts combined in memory reads as a MoE does."
        )
    if any("measured" in cost for cost in axes):
        paragraphs.append(
            "Milliseconds are medians of complete decoding steps (benchmark.py decode), divided by the batch; where several "
            "ways of serving were measured, the fastest's."
        )
    table, png = report_tables.cost_table(groups, axes), quality_against_cost(groups, axes)
    return Section("quality", "Quality against cost", paragraphs, table, png)


def _study(study: JsonObject | None) -> list[Section]:
    """Returns the further results of a study of this version."""
    if study is None or "size" not in study:
        return []
    how = (
        f"Differences from {study['baseline']} within seeds. A model whose complete interval is in the grey band is as good for "
        "all that matters here; one whose interval holds 0 but leaves the band is merely not distinguished."
    )
    return [
        Section("differences", f"Differences from {study['baseline']}", [how], png=plots_study.differences(study)),
        Section("lengths", "Loss over the length of training", png=plots_study.lengths(study)),
    ]


_SPEED = (
    "Median and quartiles of tokens per second over the logged intervals of all seeds, without each run's first, "
    "which warms up. A token counts once, forward and backward together. The time is the wall clock of "
    "complete steps, data loading and optimizer included; evaluation and saving are excluded. Models that ran at "
    "different times, or next to other programs, are not to be compared by it."
)
_ZERO_SHOT = (
    "± is the standard error from the number of items; with several seeds, the standard deviation over them. Where a "
    "model was evaluated at several nearby checkpoints, their mean, standard deviation and range are next to the last "
    "one's value: a difference between models that is not larger than these says nothing. The constant answer is the best "
    "single choice for all items."
)
_NO_ZERO_SHOT = (
    "megatron-samoe evaluate --json FILE measures them, and megatron-samoe report --zero-shot FILE shows them here."
)
_NO_SPEED = "Quartiles of a run's speed lie further apart than 15 %, as on a machine that something else uses, too."
_NO_LAYERS = "No run was made with --moe-per-layer-logging, which measures them."


def _have_experts(groups: Groups) -> bool:
    return any(group.expert_layout != "dense" for group in groups)


def _differ_in_experts(groups: Groups) -> bool:
    return len({group.first.config.moe.expert_counts for group in groups if group.expert_layout != "dense"}) > 1


def _have_coefficients(groups: Groups) -> bool:
    return any(group.expert_layout != "dense" and group.first.config.moe.has_coefficients for group in groups)


#: Plots of runs with --moe-per-layer-logging: name of the file, heading, how to read it, what draws it, and of which models.
_PLOTS: tuple[tuple[str, str, str, Callable[[Groups], bytes | None], Callable[[Groups], bool]], ...] = (
    (
        "gradients_against_experts",
        "Gradient norm per expert against the number of experts",
        "A dot is a MoE layer (first layer left), the bar is the mean over layers: gradient norm of one expert before "
        "clipping, mean over the second half of training and over experts. For a SaMoE it is that of the combined expert.",
        plots_experts.gradients_against_experts,
        _differ_in_experts,
    ),
    (
        "gradient_norms",
        "Gradient norm per expert and layer",
        "log10 of the norm in the last logged step, first seed; grey: no gradient, as no token came.",
        plots.gradient_norms,
        _have_experts,
    ),
    (
        "load_entropy",
        "Entropy of the expert load",
        "1 is an even load, 0 all tokens to one expert. Line: mean over layers and seeds; band: layers of the first seed.",
        plots_experts.load_entropies,
        _have_experts,
    ),
    (
        "expert_load",
        "Expert load per layer",
        "Share of the last logged step's tokens, relative to an even share (1), first seed.",
        plots.expert_load,
        _have_experts,
    ),
    (
        "combinations",
        "Learned combinations",
        "Weights of the pool's banks in each layer at the end, first seed; mean over experts where each has its own.",
        plots.combinations,
        _have_coefficients,
    ),
    (
        "combination_evolution",
        "Combinations over training",
        "Weights of each bank; full lines: input projections (w1), dashed: output projections (w2). First seed.",
        plots_experts.combination_evolution,
        _have_coefficients,
    ),
)


def _sections(groups: Groups, data: ReportData) -> list[Section]:
    losses = "Thin: training, every seed. Marks: validation, mean over seeds; bars: lowest and highest seed."
    if len(groups) > 1:
        losses += (
            " Right, from a tenth of the tokens on: differences of training (lines, means over a twentieth of the run) and of "
            "validation (marks)."
        )
    speed = report_tables.speed_table(groups)
    return [
        _glance(groups),
        _results(groups, data),
        *_study(data.study),
        _quality(groups, data),
        Section("speed", "Training speed", [_SPEED], speed, without=Section.without if speed else _NO_SPEED),
        Section("loss_curves", "Loss curves", [losses], png=plots.loss_curves(groups)),
        Section(
            "zero_shot",
            "Zero-shot tasks",
            [_ZERO_SHOT],
            report_tables.zero_shot_table(groups, data.zero_shot),
            without=_NO_ZERO_SHOT,
        ),
        *(
            Section(name, heading, [text], png=draw(groups), without=_NO_LAYERS)
            for name, heading, text, draw, are_for in _PLOTS
            if are_for(groups)
        ),
    ]
