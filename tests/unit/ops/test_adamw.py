"""The fused AdamW against torch.optim.AdamW and its slow twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.ops.adamw import AdamWRun, adamw, serves
from tests.harness.devices import CPU, GPU, on
from tests.harness.extension_off import without_extension
from tests.harness.op_checks import RATES, adamw_runs, check_adamw, set_gradients, threads_of_torch

SIZES = [0, 1, 7, 16, 513, 40_000]
needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


@on(CPU, GPU)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=str)
def test_steps_equal_torchs(device: str, dtype: torch.dtype, tolerance: float) -> None:
    check_adamw(SIZES, dtype, tolerance, device=device)


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    results: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        with threads_of_torch(threads):
            runs = adamw_runs(SIZES, torch.float32, bf16_weights=True)
            for step in range(1, 4):
                set_gradients(runs, step)
                adamw(runs, RATES, step)
            results.append([run.master for run in runs])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_steps_without_the_extension_equal_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    without_extension(monkeypatch)
    assert not serves(adamw_runs(SIZES, torch.float32, bf16_weights=True))
    check_adamw(SIZES, torch.float32, 2e-6)


@needs_library
def test_an_elements_bits_do_not_depend_on_where_it_lies() -> None:
    (run,) = [run for run in adamw_runs(SIZES, torch.float32, False) if run.master.numel() == 513]
    run.grad.normal_(generator=torch.Generator().manual_seed(3))
    tensors = (run.master, run.grad, run.exp_avg, run.exp_avg_sq)
    parts = [
        AdamWRun(p[0].clone(), None, *(t.clone() for t in p[1:]))
        for p in zip(*(t.split(101) for t in tensors), strict=True)
    ]
    adamw([run], RATES, 1)
    adamw(parts, RATES, 1)
    assert torch.equal(run.master, torch.cat([part.master for part in parts]))


@needs_library
def test_numbers_that_are_none_stay_seen() -> None:
    (run,) = [run for run in adamw_runs(SIZES, torch.float32, False) if run.master.numel() == 513]
    run.grad.normal_()
    run.grad[5], run.grad[512] = torch.nan, torch.inf
    adamw([run], RATES, 1)
    assert torch.isnan(run.master[5]) and torch.isnan(run.master[512])
    assert torch.isfinite(run.master).sum() == 511
