"""Coefficients of each expert, gathered from the ranks that hold the experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.hooks.moe_diagnostics import gathered_coefficients
from megatron_samoe.training.setup import build_setup
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, tiny_config, with_layout

pytestmark = pytest.mark.distributed


def gathered(ep: int, options: dict[str, Any]) -> torch.Tensor:
    config = with_layout(tiny_config(**options, samoe_granularity="expert", samoe_init="uniform"), ep=ep)
    return gathered_coefficients(build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel)))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_expert_banks": 1}, {"layout": "moe", "expert_sharing": "scaled:combined,0,0,combined"}],
    ids=str,
)
def test_two_ranks_show_the_coefficients_of_one_process(options: dict[str, Any]) -> None:
    (alone,) = run_ranks(gathered, 1, 1, options)
    assert alone.shape[2] == 4 and alone[0].abs().min() > 0
    for a_L2GP in run_ranks(gathered, 2, 2, options):
        torch.testing.assert_close(a_L2GP, alone)
