"""The engine's own decisions: which runner runs, and what is left of a step that failed."""

from __future__ import annotations

import pytest
import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference import engine as engine_module
from megatron_samoe.inference.engine import Engine, check_cuda_limits, takes_single_runner
from megatron_samoe.inference.request import Request
from megatron_samoe.inference.sampling import SamplingOptions
from tests.harness.tiny import tiny_config
from tests.unit.inference.tiny_models import loaded_tiny


@pytest.mark.parametrize(
    ("device", "ranks", "dtype", "kernels", "expected"),
    [
        ("cpu", 1, "fp32", False, True),
        ("cpu", 2, "fp32", False, False),
        ("cuda", 1, "bf16", False, False),
        ("cuda", 1, "int8", False, True),
        ("cuda", 1, "bf16", True, True),
        ("cuda", 2, "bf16", True, False),
    ],
)
def test_who_runs_the_model(
    device: str, ranks: int, dtype: str, kernels: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "uses_cuda_kernels", lambda: kernels)
    assert takes_single_runner(device, ranks, dtype) is expected  # type: ignore[arg-type]


def test_models_beyond_the_cuda_kernels_are_refused_at_start() -> None:
    many = tiny_config("samoe", num_expert_banks=65)
    check_cuda_limits(many, "folded")
    with pytest.raises(ConfigError, match="serving = 'on-the-fly': combines 65 banks, and may 64 on a GPU"):
        check_cuda_limits(many, "on-the-fly")
    with pytest.raises(ConfigError, match="kv_channels = 272: may be 256 on a GPU; MEGATRON_SAMOE_CUDA_KERNELS=0"):
        check_cuda_limits(tiny_config("moe", kv_channels=272), "folded")


def test_a_step_that_failed_is_done_again() -> None:
    request = Request([5, 9, 11], SamplingOptions(max_new_tokens=4, temperature=0.0))

    def answer(fail_at: tuple[int, ...]) -> list[int]:
        engine = Engine(loaded_tiny("moe"), max_batch=2)
        engine.submit(request)
        run, tokens, steps = engine._runner.run, [], 0

        def failing(batch: object) -> torch.Tensor:
            if steps in fail_at:
                raise RuntimeError("no memory")
            return run(batch)  # type: ignore[arg-type]

        engine._runner.run = failing  # type: ignore[method-assign,assignment]
        while engine.has_work:
            assert steps < 20
            try:
                tokens += [event.token_id for event in engine.step()]
            except RuntimeError:
                assert steps in fail_at
            steps += 1
        return tokens

    assert len(answer(())) == 4
    assert answer((0, 2)) == answer(())
