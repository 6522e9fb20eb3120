"""The norm of gradients, against numpy's in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_samoe.optimizer.clip_grads import global_grad_norm
from megatron_samoe.parallel_state.state import single_process_state


@dataclass
class Part:
    """What the norm reads of a piece of a gradient buffer."""

    grad: Tensor
    counts: bool = True


def norm(parts: list[Tensor]) -> float:
    return global_grad_norm([Part(part) for part in parts], single_process_state()).item()  # type: ignore[misc]


@pytest.mark.parametrize(
    "shapes", [[(3,)], [(4096,)], [(4097,), (0,), (5, 7)], [(4095,), (8192,)], [(1 << 24,)], [(2000, 1001)]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_exact_at_any_size(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(shape, generator=generator, dtype=dtype) * 1e-3 for shape in shapes]
    exact = np.sqrt(sum(float(np.square(part.numpy().astype(np.float64)).sum()) for part in parts))
    assert norm(parts) == pytest.approx(exact, rel=2e-8 if dtype == torch.float32 and parts[0].numel() > 1e6 else 2e-7)


def test_it_does_not_depend_on_how_the_gradient_is_cut() -> None:
    """As layouts cut it."""
    grad = torch.randn(1 << 22, generator=torch.Generator().manual_seed(2))
    norms = [norm(list(grad.split(size))) for size in (1 << 22, 1 << 20, 1_000_003, 4096, 777)]
    assert max(norms) / min(norms) - 1 < 1e-7


def test_it_says_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        grad = torch.ones(9000)
        grad[8999] = bad
        assert not np.isfinite(norm([grad]))
