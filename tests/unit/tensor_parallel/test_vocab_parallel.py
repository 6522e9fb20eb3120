"""Cross-entropy and KL divergence over a split vocabulary against torch's own over the whole, and what padding of the vocabulary must
not do. That split layers are whole ones is the parity table's matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.parallel_state import Group, initialize_model_parallel, single_process_state
from megatron_samoe.parallel_state.parameter_tag import Init
from megatron_samoe.tensor_parallel import cross_entropy
from megatron_samoe.tensor_parallel.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy
from megatron_samoe.tensor_parallel.kl_divergence import vocab_parallel_kl_divergence
from megatron_samoe.tensor_parallel.layers import VocabParallelEmbedding
from tests.harness.ranks import run_ranks

H, T, VOCAB, PADDED = 6, 12, 9, 16
INIT = Init(std=0.3)


def used_rows() -> tuple[int, int, tuple[int, ...]]:
    state = initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=4))
    embedding = VocabParallelEmbedding(VOCAB, PADDED, H, init=INIT, state=state, dtype=torch.float32)
    with torch.no_grad():
        embedding.weight.fill_(1.0)
    return embedding.first_id, embedding.num_used_rows, tuple(embedding.logits(torch.ones(2, H)).shape)


@pytest.mark.distributed
def test_ranks_with_nothing_but_padding_have_no_logits() -> None:
    assert run_ranks(used_rows, 4) == [(0, 4, (2, 4)), (4, 4, (2, 4)), (8, 1, (2, 4)), (12, 0, (2, 0))]


def test_padding_takes_no_probability_and_no_gradient() -> None:
    """Whatever stands in the padded rows, and however many there are, the loss is the same."""
    losses = []
    for padded in (VOCAB, PADDED, 64):
        embedding = VocabParallelEmbedding(
            VOCAB, padded, H, init=INIT, state=single_process_state(), dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            embedding.weight[:VOCAB] = torch.randn(VOCAB, H, generator=generator, dtype=torch.float64)
            embedding.weight[VOCAB:] = 1e3
        x = torch.randn(T, H, generator=generator, dtype=torch.float64)
        logits = embedding.logits(x)
        assert logits.shape == (T, padded) and logits.is_contiguous(), "no product has an odd width"
        assert logits[:, :VOCAB].isfinite().all() and (logits[:, VOCAB:] == -torch.inf).all()
        loss = F.cross_entropy(logits, torch.arange(T) % VOCAB)
        loss.backward()
        losses.append(loss.item())
        assert embedding.weight.grad is not None
        assert not embedding.weight.grad[VOCAB:].any()
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-14)


V, T, TEMPERATURE = 13, 40, 1.7
#: Widths of the ranks' parts of the vocabulary.
SPLITS = ([7, 6], [13, 0], [0, 13], [1, 12])
Loss = Literal["cross-entropy", "KL"]


def example(kind: Loss, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits, labels or a teacher's logits, and weights of tokens."""
    generator = torch.Generator().manual_seed(5)
    logits, teacher = ((torch.randn(T, V, generator=generator).double() * 5).to(dtype) for _ in range(2))
    labels = torch.randint(V, (T,), generator=generator)
    labels[:V] = torch.arange(V)
    weights = torch.randn(T, generator=generator, dtype=torch.float64)
    return logits, labels if kind == "cross-entropy" else teacher, weights


def loss_of(kind: Loss, logits: Tensor, target: Tensor, columns: slice, group: Group) -> Tensor:
    """Returns our loss of each token, from a part of the vocabulary."""
    if kind == "cross-entropy":
        return vocab_parallel_cross_entropy(logits, target, columns.start, group)
    return vocab_parallel_kl_divergence(logits, target[:, columns], TEMPERATURE, group)


def torchs_loss(kind: Loss, logits: Tensor, target: Tensor) -> Tensor:
    if kind == "cross-entropy":
        return F.cross_entropy(logits, target, reduction="none")
    q, p = ((t / TEMPERATURE).log_softmax(dim=1) for t in (logits, target.double()))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)


def run_split(kind: Loss, dtype: torch.dtype, shift: float) -> list[tuple[Tensor, Tensor]]:
    group = initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=2)).tp
    results = []
    for widths in SPLITS:
        logits, target, weights = example(kind, dtype)
        first = sum(widths[: group.rank])
        columns = slice(first, first + widths[group.rank])
        part = (logits + shift)[:, columns].clone().requires_grad_()
        losses = loss_of(kind, part, target, columns, group)
        (losses * weights.to(losses.dtype)).sum().backward()
        assert part.grad is not None
        results.append((losses.detach(), part.grad))
    return results


def check(kind: Loss, losses: Tensor, grads: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    logits, target, weights = example(kind, dtype)
    exact = logits.double().requires_grad_()
    expected = torchs_loss(kind, exact, target)
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    loose = 1e-2 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(grads.double(), exact.grad, rtol=loose, atol=loose)


DTYPES = [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
both_losses = pytest.mark.parametrize("kind", ["cross-entropy", "KL"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "tolerance", "shift"), [*((*one, 0.0) for one in DTYPES), (torch.float64, 1e-10, 1e4)]
)
@both_losses
def test_two_ranks_equal_torch_on_uneven_and_empty_parts(
    kind: Loss, dtype: torch.dtype, tolerance: float, shift: float
) -> None:
    """A shift of all logits changes nothing."""
    ranks: Any = run_ranks(run_split, 2, kind, dtype, shift)
    for (left, left_grad), (right, right_grad) in zip(*ranks, strict=True):
        assert torch.equal(left, right), "all ranks have the same losses"
        check(kind, left, torch.cat((left_grad, right_grad), 1), dtype, tolerance)


SCALARS: list[Callable[[Tensor], Tensor]] = [lambda t: t.sum(), lambda t: t[::2].sum(), lambda t: (t * 2).mean()]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@both_losses
def test_losses_and_gradients_of_sums_and_slices(kind: Loss, dtype: torch.dtype, tolerance: float) -> None:
    """`losses.sum()` gives a gradient of stride 0, every second loss one with gaps; logits may be a slice."""
    logits, target, _ = example(kind, dtype)
    for scalar in SCALARS:
        whole = torch.cat((logits, logits), 1).requires_grad_()
        exact = logits.double().clone().requires_grad_()
        losses = loss_of(kind, whole[:, :V], target, slice(0, V), single_process_state().tp)
        expected = torchs_loss(kind, exact, target)
        torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
        scalar(losses).backward()
        scalar(expected).backward()
        assert whole.grad is not None
        loose = 1e-2 if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(whole.grad[:, :V].double(), exact.grad, rtol=loose, atol=loose)
        assert not whole.grad[:, V:].any()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_without_kept_logits(
    dtype: torch.dtype, tolerance: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients of input and matrix, of which the last rows are padding, against torch's own."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(T, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V + 3, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    _, labels, factors = example("cross-entropy", dtype)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 7 * len(weight) + 1)
    losses = linear_cross_entropy(x, weight, V, labels, 0, single_process_state().tp, softcap)
    (losses * factors.to(losses.dtype)).sum().backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = exact_x @ exact_weight[:V].t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected * factors).sum().backward()
    for got, wanted in ((losses, expected), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert got is not None and wanted is not None
        torch.testing.assert_close(got.double(), wanted.detach(), rtol=tolerance, atol=tolerance)


def test_the_matrixs_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in bf16 would stand still where it is 256 times as large as what one token adds."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    x, weight = (torch.full(shape, value, dtype=torch.bfloat16) for shape, value in (((1000, 2), 1.0), ((4, 2), 0.0)))
    losses = linear_cross_entropy(
        x, weight.requires_grad_(), 4, torch.ones(1000, dtype=torch.long), 0, single_process_state().tp, None
    )
    losses.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0].float(), torch.full((2,), 250.0), rtol=1e-2, atol=0.0)
