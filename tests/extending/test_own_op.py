"""The op of docs/extending.md: kernel against twin, gradients, torch's own checks, and the CUDA half through nvcc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.extending.own_op import COMPILERS, SOURCE, reference, sqrt_softplus, sqrt_softplus_backward

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (1000,)])
def test_the_kernel_is_its_twin_with_its_gradient(shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 8).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weight = torch.randn(shape)
    torch.testing.assert_close(sqrt_softplus(x).double(), reference(exact), rtol=1e-5, atol=1e-7)
    (dx,) = torch.autograd.grad((sqrt_softplus(x) * weight).sum(), x)
    (expected,) = torch.autograd.grad((reference(exact) * weight).sum(), exact)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-7)


def test_far_below_zero_there_is_still_a_gradient() -> None:
    x = torch.tensor([-60.0, -14.9, -15.1, 90.0])
    expected = reference(x.double())
    torch.testing.assert_close(sqrt_softplus(x).double(), expected, rtol=1e-5, atol=0)
    slope = torch.sigmoid(x.double()) / (2 * expected)
    torch.testing.assert_close(sqrt_softplus_backward(x, torch.ones(4)).double(), slope, rtol=1e-5, atol=0)


def test_torch_finds_nothing_wrong_with_it() -> None:
    x = torch.randn(4, 6)
    torch.library.opcheck(sqrt_softplus, (x.requires_grad_(),))
    torch.library.opcheck(sqrt_softplus, (x.detach().t(),))
    torch.library.opcheck(sqrt_softplus_backward, (x.detach(), torch.randn(4, 6)))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_same_source_compiles_for_cuda(tmp_path: Path) -> None:
    built = tmp_path / "kernels.so"
    subprocess.run([*COMPILERS["cuda"], "-O3", "-shared", "-o", built, SOURCE], check=True)
    symbols = subprocess.run(["nm", "-D", built], check=True, capture_output=True, text=True).stdout
    assert " T forward" in symbols and " T backward" in symbols
