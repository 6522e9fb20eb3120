"""Ops against references that no run compares at its start: cross-entropy, experts, AdamW; see `runtime.reference_checks`. Random parts
of layers for inference's ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_samoe.ops import reference
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.decode import stored
from megatron_samoe.ops.decode_parts import PAGE, AttentionLayer, ExpertStack, Norm
from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp

Device = torch.device | str


@contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """Gives torch so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cross_entropy_inputs(
    num_tokens: int, width: int, first_id: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random logits_TV, labels_T (some in no column) and dloss_T."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (torch.randn(num_tokens, width, generator=generator) * 4).to(dtype)
    labels_T = torch.randint(0, first_id + width + 5, (num_tokens,), generator=generator)
    dloss_T = torch.randn(num_tokens, generator=generator)
    return logits_TV, labels_T, dloss_T


def check_cross_entropy(
    num_tokens: int, width: int, first_id: int, seed: int, dtype: torch.dtype, device: Device = "cpu"
) -> None:
    """Compares cross_entropy_parts and cross_entropy_backward on a device with their references."""
    logits_TV, labels_T, dloss_T = cross_entropy_inputs(num_tokens, width, first_id, seed, dtype)
    exact = reference.cross_entropy_parts(logits_TV.double(), labels_T, first_id)
    got = cross_entropy_parts(logits_TV.to(device), labels_T.to(device), first_id)
    for part, expected in zip(got, exact, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.cpu().double(), expected, rtol=2e-6, atol=1e-6)
    logsumexp_T = exact[0] + exact[1].log()
    dlogits_TV = cross_entropy_backward(
        logits_TV.to(device), labels_T.to(device), first_id, logsumexp_T.float().to(device), dloss_T.to(device)
    ).cpu()
    assert dlogits_TV.dtype == dtype
    expected = reference.cross_entropy_backward(logits_TV.double(), labels_T, first_id, logsumexp_T, dloss_T.double())
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    torch.testing.assert_close(dlogits_TV.double(), expected, **tolerance)


def expert_weights(
    E: int, F: int, H: int, activation: str, bias: bool, dtype: torch.dtype, device: Device = "cpu"
) -> ExpertWeights:
    """Returns random weights of E experts that require gradients."""
    up = (2, F) if activation == "swiglu" else (F,)

    def new(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.4).to(device, dtype).requires_grad_()

    return ExpertWeights(new(E, *up, H), new(E, H, F), new(E, *up) if bias else None, new(E, H) if bias else None)


def grouped_mlp_reference(x_RH: Tensor, rows: Sequence[int], w: ExpertWeights, activation: str) -> Tensor:
    """Returns the reference's y_RH."""
    return reference.grouped_mlp(x_RH, rows, w.w1, w.w2, w.b1, w.b2, activation == "swiglu")


def routed_rows(num_tokens: int, topk: int, num_experts: int, seed: int) -> list[int]:
    """Returns rows per expert of tokens that each chose topk experts, the first experts more often than the last."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(num_experts, 0, -1, dtype=torch.float64)
    weights[num_experts // 2] = 1e-9  # nearly never chosen
    if num_tokens == 0:
        return [0] * num_experts
    ids = torch.multinomial(weights.expand(num_tokens, -1), topk, generator=generator)
    return torch.bincount(ids.flatten(), minlength=num_experts).tolist()


def check_grouped_mlp(
    rows: list[int],
    F: int,
    H: int,
    activation: Any,
    bias: bool,
    dtype: torch.dtype,
    tolerance: float,
    main_grads: bool,
    device: Device = "cpu",
) -> None:
    """Compares grouped_mlp on a device with its reference in fp64: the output and the gradients of all inputs.

    Args:
        main_grads: whether gradients are added twice to fp32 main gradients; else autograd gets them.
    """
    weights = expert_weights(len(rows), F, H, activation, bias, dtype, device)
    x = torch.randn(sum(rows), H, dtype=torch.float64).to(device, dtype).requires_grad_()
    dy = torch.randn(sum(rows), H, dtype=torch.float64).to(device, dtype)
    exact = weights.map(lambda t: t.detach().cpu().double().requires_grad_())
    exact_x = x.detach().cpu().double().requires_grad_()
    expected = grouped_mlp_reference(exact_x, rows, exact, activation)
    expected.backward(dy.cpu().double())

    grads = None
    repeats = 1
    if main_grads:
        wide = torch.promote_types(dtype, torch.float32)
        grads, repeats = weights.map(lambda t: torch.ones_like(t, dtype=wide, requires_grad=False)), 2
    counts = torch.tensor(rows, device=device)
    for _ in range(repeats):
        x.grad = None
        y = grouped_mlp(x, counts, weights, activation, grads)
        assert y.dtype == dtype
        y.backward(dy)

    def check(name: str, actual: Tensor | None, wanted: Tensor | None) -> None:
        assert actual is not None and wanted is not None, name
        scale = max(1.0, float(wanted.detach().abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(
            actual.cpu().double(), wanted.detach(), rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
        )

    check("y", y, expected)
    check("dx", x.grad, exact_x.grad)
    for name, weight in weights.items():
        gradient = getattr(exact, name).grad
        if grads is None:
            check(name, weight.grad, gradient)
        else:
            assert weight.grad is None, "autograd gets no second gradient"
            check(name, getattr(grads, name), 1 + repeats * gradient)


RATES = AdamWRates(lr=0.02, beta1=0.85, beta2=0.97, eps=1e-6, weight_decay=0.2)


def adamw_runs(sizes: Sequence[int], dtype: torch.dtype, bf16_weights: bool, device: Device = "cpu") -> list[AdamWRun]:
    """Returns runs of some sizes with zero moments; with `bf16_weights` every second one has a weight to follow."""
    generator = torch.Generator().manual_seed(1)
    runs = []
    for number, size in enumerate(sizes):
        master = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = master.bfloat16() if bf16_weights and number % 2 else None
        runs.append(AdamWRun(master, weight, *(torch.zeros_like(master) for _ in range(3))))
    return runs


def set_gradients(runs: list[AdamWRun], step: int) -> None:
    """Fills the gradients of a step with random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(100 + step)
    for run in runs:
        run.grad.copy_(torch.randn(run.grad.shape, generator=generator, dtype=torch.float64))


def check_adamw(
    sizes: Sequence[int], dtype: torch.dtype, tolerance: float, num_steps: int = 6, device: Device = "cpu"
) -> None:
    """Compares adamw on a device with torch.optim.AdamW on the CPU: masters, moments, and weights that follow."""
    runs = adamw_runs(sizes, dtype, bf16_weights=True, device=device)
    theirs = [run.master.cpu().clone().requires_grad_() for run in runs]
    optimizer = torch.optim.AdamW(
        theirs, lr=RATES.lr, betas=(RATES.beta1, RATES.beta2), eps=RATES.eps, weight_decay=RATES.weight_decay
    )
    for step in range(1, num_steps + 1):
        set_gradients(runs, step)
        for run, p in zip(runs, theirs, strict=True):
            p.grad = run.grad.cpu().clone()
        adamw(runs, RATES, step)
        optimizer.step()
        for run, p in zip(runs, theirs, strict=True):
            torch.testing.assert_close(run.master.cpu(), p.detach(), rtol=tolerance, atol=tolerance)
            if run.weight is not None:
                assert torch.equal(run.weight, run.master.bfloat16())
    for run, p in zip(runs, theirs, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                getattr(run, moment).cpu(), optimizer.state[p][moment], rtol=10 * tolerance, atol=tolerance
            )


T = TypeVar("T")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_norm(size: int, rms: bool, bias: bool) -> Norm:
    return Norm(1 + 0.1 * normal(1, size), normal(2, size) if bias else None, 1e-5, rms)


def make_experts(hidden: int, ffn: int, matrices: int, experts: int, kind: str, gated: bool, bias: bool) -> ExpertStack:
    up = (2, ffn) if gated else (ffn,)
    generator = torch.Generator().manual_seed(5)
    return ExpertStack(
        stored(normal(3, matrices, *up, hidden) * hidden**-0.5, kind),
        stored(normal(4, matrices, hidden, ffn) * ffn**-0.5, kind),
        normal(5, matrices, *up) if bias else None,
        normal(6, matrices, hidden) if bias else None,
        gated,
        torch.randint(matrices, (experts,), generator=generator),
        torch.randint(matrices, (experts,), generator=generator),
        *((normal(7, experts), normal(8, experts)) if gated else ()),
    )


def make_attention(
    hidden: int, groups: int, queries: int, head_dim: int, kind: str, style: str, cache: torch.dtype, pages: int
) -> AttentionLayer:
    gpt = style == "gpt"
    head_norm = make_norm(head_dim, not gpt, gpt)
    return AttentionLayer(
        make_norm(hidden, not gpt, gpt),
        stored(normal(7, groups, queries + 2, head_dim, hidden) * hidden**-0.5, kind),
        normal(8, groups, queries + 2, head_dim) if gpt else None,
        None if style == "plain" else (head_norm, head_norm),
        stored(normal(9, hidden, groups * queries * head_dim) * hidden**-0.5, kind),
        normal(10, hidden) if gpt else None,
        torch.zeros(pages, groups, head_dim, PAGE, dtype=cache),
        torch.zeros(pages, groups, PAGE, head_dim, dtype=cache),
    )


def moved(value: T, device: torch.device | str) -> T:
    """Returns a copy of a value, its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)  # type: ignore[return-value]
    if hasattr(value, "__dataclass_fields__"):
        parts: dict[str, Any] = {f.name: moved(getattr(value, f.name), device) for f in fields(value)}  # type: ignore[arg-type]
        return replace(value, **parts)  # type: ignore[type-var]
    return value
