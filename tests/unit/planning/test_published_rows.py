"""Published runs: each is complete, of a family on one side, and a configuration whose operations are those that its page counts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError
from megatron_samoe.planning.accounting import train_flops_per_token
from tests.harness.program import call
from tools.benchmarks.gpu_budget import LaunchCounter
from tools.planner.rows import (
    BIAS_BF16,
    BIAS_FP32,
    CLAMP,
    CLAMP_FORWARDS,
    HERE,
    config_of,
    families,
    models,
    read_rows,
)

ROWS = read_rows()
MODELLED = [row for row in ROWS if row.not_modelled is None]


def test_rows_are_many_and_from_named_sources() -> None:
    assert len(MODELLED) >= 40 and sum(row.is_moe for row in MODELLED) >= 15
    head = [line for line in (HERE / "speeds.csv").read_text().splitlines() if line.startswith("#")]
    assert all(any(f"{row.source}:" in line for line in head) for row in ROWS)
    assert {row.precision for row in ROWS} == {"bf16", "fp8", "mxfp8", "nvfp4"}


def test_families_are_on_one_side_with_all_their_models() -> None:
    fit, held_out = families()["fit"], families()["held_out"]
    assert not set(fit) & set(held_out)
    for row in MODELLED:
        assert sum(row.model.startswith(family) for family in (*fit, *held_out)) == 1, row.model
    assert Counter(row.family in fit for row in MODELLED)[False] >= 40
    assert {row.not_modelled for row in ROWS} - {None} <= set(families()["not_modelled"])


@pytest.mark.parametrize("name", sorted({row.model for row in MODELLED}))
def test_a_row_is_a_legal_configuration_with_the_pages_operations(name: str) -> None:
    """Bridge's pages count causal attention as half a square, as here; NeMo's before counted all of it, which is that of a
    sequence twice as long, but not for 65,536 tokens. GPT-OSS was counted with less until 26.06."""
    rows = [row for row in MODELLED if row.model == name]
    for row in rows:
        validate(config_of(row), row.gpus)
    early = [
        replace(row, seq=2 * row.seq if row.seq < 65536 else row.seq)
        for row in rows
        if row.source == "nemo" and row.tflops
    ]
    late = [row for row in rows if row.source == "bridge" and (row.version >= "26.06" or "OSS" not in name)]
    ratios = [
        train_flops_per_token(config_of(row), models()[name]["vocab_size"]) * row.tokens_per_s / row.tflops / 1e12
        for row in late or early
        if row.tflops
    ]
    assert 0.97 < statistics.median(ratios) < 1.015


def test_plan_reads_what_is_printed_for_a_row(tmp_path: Path) -> None:
    row = next(row for row in MODELLED if row.model == "Qwen3-30B-A3B" and row.gpus == 8)
    (tmp_path / "run.yaml").write_text(call("tools.planner.rows", str(row.number)).stdout)
    words = ("--config", str(tmp_path / "run.yaml"), "--world-size", "8", "--memory-gb", "180", "--top", "1")
    result = call("megatron_samoe.cli.plan", *words)
    assert result.returncode == 0 and "ep8" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("column", "value", "said"), [("seq", "", "seq.*is missing in row 3"), ("gpus", "x", "must be a number in row 3")]
)
def test_a_row_without_a_column_is_refused_in_a_sentence(column: str, value: str, said: str, tmp_path: Path) -> None:
    lines = [line for line in (HERE / "speeds.csv").read_text().splitlines() if not line.startswith("#")]
    cells = lines[3].split(",")
    cells[lines[0].split(",").index(column)] = value
    path = tmp_path / "speeds.csv"
    path.write_text("\n".join([*lines[:3], ",".join(cells)]))
    with pytest.raises(ConfigError, match=said):
        read_rows(path)


def clamped(x: Tensor) -> Tensor:
    """Returns an activation's two halves, the first below 7 and the second within 7."""
    gate, linear = x.chunk(2, -1)
    return torch.cat((gate.clamp(max=7.0), linear.clamp(-7.0, 7.0)), -1)


def biased(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns what adds a bias of each of two experts, times a weight of each row in a dtype."""
    biases = [torch.ones(1024, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    weights = torch.ones(512, 1, dtype=dtype, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        parts = zip(x.split(256), biases, weights.split(256), strict=True)
        return torch.cat([part + bias * weight for part, bias, weight in parts]).to(x.dtype)

    return run


@pytest.mark.parametrize(
    ("operations", "width", "forwards", "both"),
    [
        (clamped, 2048, CLAMP_FORWARDS, CLAMP),
        (biased(torch.float32), 1024, 28, BIAS_FP32),
        (biased(torch.bfloat16), 1024, 12, BIAS_BF16),
    ],
)
def test_bytes_of_experts_biases_and_clamps_are_those_of_torchs_operations(
    operations: Callable[[Tensor], Tensor], width: int, forwards: int, both: int
) -> None:
    """512 rows of 1,024 elements, the clamp's of twice as many."""
    x = torch.ones(512, width, dtype=torch.bfloat16, requires_grad=True)
    with LaunchCounter() as traffic:
        y = operations(x)
        assert traffic.num_bytes == pytest.approx(512 * 1024 * forwards, rel=0.01)
        y.backward(torch.ones_like(x))
    made = 2 * 512 * width  # the gradient that the test makes, beside x that it is made like
    assert traffic.num_bytes - 2 * made == pytest.approx(512 * 1024 * both, rel=0.01)
