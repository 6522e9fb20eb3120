"""The program for several GPUs, with two ranks on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.ops import extension
from tests.gpu import run_multi_gpu as program
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
]
MODELS = ["moe top2 llama"]


def _everything(expected: dict) -> tuple[list[str], str]:
    device = torch.device("cpu")
    group = program.exchanging_group(device)
    program.check_exchanges(group, device, 12, 300)
    line = program.measure(group, device, 0.25, 3)
    done = program.check_layouts(expected if dist.get_rank() == 0 else None, MODELS, device)
    return done, line


@pytest.mark.night
def test_it_runs_and_agrees() -> None:
    expected = program.one_process(MODELS, "cpu")
    done, line = run_ranks(_everything, 2, expected)[0]
    assert "moe top2 llama, ep2" in done and len(done) >= 8
    assert line.startswith("0.25 MB a rank, GB/s sent by each: ours ") and "torch" in line


def test_it_finds_a_difference() -> None:
    expected = program.one_process(MODELS, "cpu")
    expected[MODELS[0]]["losses"][0] *= 1.001
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run_ranks(_everything, 2, expected)
