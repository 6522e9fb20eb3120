"""Expert MLPs over rows that are sorted by expert: two products per expert, activation between.

On a CPU the compiled op runs complete experts per thread, with activation and bias between the products while the rows are
in the cache. Without the op each expert is one call of the BLAS. On a device that works asynchronously, products are
those of all experts together, and the host does not know how many rows an expert has (`grouped_products`).

Weight gradients are added straight into fp32 main gradients where the caller has them: page faults of fresh gradient
tensors for all experts would cost more time than the products. The backward recomputes the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.ops import extension, grouped_products
from megatron_samoe.ops.asynchronous import runs_behind_host
from megatron_samoe.ops.grouped_products import ExpertRows

#: Rows of each expert. On a device that works asynchronously, a tensor of the device, or what was made of it.
Counts = Sequence[int] | Tensor | ExpertRows

#: gelu is the tanh form, as GPT-2 and GPT-3 have it.
Activation = Literal["gelu", "gelu_exact", "swiglu"]
#: What torch calls the forms.
GELU_FORM = {"gelu": "tanh", "gelu_exact": "none"}
#: What the compiled op computes.
_COMPILED: tuple[Activation, ...] = ("gelu", "swiglu")


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of e experts, or tensors of the same shapes (gradients, banks with leading dims).

    Attributes:
        w1: [e, F, H] for GELU; [e, 2, F, H] for SwiGLU, gate first.
        w2: [e, H, F].
        b1: [e, F] or [e, 2, F], or None.
        b2: [e, H], or None.
    """

    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """Returns the result of a function of each tensor."""
        return ExpertWeights(**{name: function(t) for name, t in self.items()})

    def items(self) -> list[tuple[str, Tensor]]:
        """Returns the (name, tensor) pairs that exist."""
        return [(f.name, t) for f in fields(self) if (t := getattr(self, f.name)) is not None]


def grouped_mlp(
    x_RH: Tensor,
    rows_per_expert: Counts,
    weights: ExpertWeights,
    activation: Activation,
    main_grads: ExpertWeights | None = None,
) -> Tensor:
    """Returns y_RH: each expert's MLP applied to its rows.

    Args:
        x_RH: rows sorted by expert.
        rows_per_expert: e counts that sum to R, int64 [e] on the device of x; they may be 0. On a device that runs behind the
            host they may sum to less: the last expert has the rows that are left, which get no gradient.
        weights: of e experts, in the dtype of x.
        main_grads: if given, weight gradients are added there (any float dtype) and autograd gets none.

    Raises:
        ValueError: the counts are negative or do not sum to R; only where the host can look at them without a wait.
    """
    parts = (weights.w1, weights.w2, weights.b1, weights.b2)
    if main_grads is not None:
        x_RH = with_backward(x_RH)
    rows = expert_rows(rows_per_expert, x_RH)
    return _GroupedMLP.apply(x_RH, rows, activation, main_grads, torch.is_grad_enabled(), *parts)


def expert_rows(rows_per_expert: Counts, x_RH: Tensor) -> list[int] | ExpertRows:
    """Returns how many rows of x each expert has, as the forward and the backward on its device take it."""
    if isinstance(rows_per_expert, ExpertRows):
        return rows_per_expert
    if runs_behind_host(x_RH.device):
        if not isinstance(rows_per_expert, Tensor):
            rows_per_expert = torch.tensor(rows_per_expert, device=x_RH.device)
        return ExpertRows(rows_per_expert, len(x_RH))
    rows = rows_per_expert.tolist() if isinstance(rows_per_expert, Tensor) else list(rows_per_expert)
    if sum(rows) != len(x_RH) or any(n < 0 for n in rows):
        raise ValueError(f"rows_per_expert must be counts that sum to {len(x_RH)} rows, not {rows}")
    return rows


def with_backward(x: Tensor) -> Tensor:
    """Returns x such that autograd visits the op that takes it, for ops whose backward has side effects."""
    return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_RH: Tensor,
        rows: list[int] | ExpertRows,
        activation: Activation,
        main_grads: ExpertWeights | None,
        keep: bool,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
    ) -> Tensor:
        y_RH, h_RU = grouped_mlp_forward(x_RH, rows, ExpertWeights(w1, w2, b1, b2), activation, keep)
        ctx.save_for_backward(x_RH, h_RU, w1, w2, b1, b2)
        ctx.rows, ctx.activation, ctx.main_grads = rows, activation, main_grads
        return y_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_RH, h_RU, *parts = ctx.saved_tensors
        weights = ExpertWeights(*parts)
        grads = ctx.main_grads
        if grads is None:
            grads = weights.map(lambda t: torch.zeros_like(t, dtype=extension.accumulation_dtype(t.dtype)))
        dx_RH = grouped_mlp_backward(dy_RH, x_RH, h_RU, ctx.rows, weights, ctx.activation, grads)
        if ctx.main_grads is not None:
            return dx_RH, *(None,) * 8
        own = [None if t is None else getattr(grads, n).to(t.dtype) for n, t in zip(_NAMES, parts, strict=True)]
        return dx_RH, *(None,) * 4, *own


_NAMES = tuple(f.name for f in fields(ExpertWeights))


def grouped_mlp_forward(
    x_RH: Tensor, rows: list[int] | ExpertRows, weights: ExpertWeights, activation: Activation, keep_hidden: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns (y_RH, h_RU): the outputs, and the first product for the backward ([R, F], or [R, 2F] for SwiGLU).

    Args:
        rows: of `expert_rows`.
        keep_hidden: whether a backward follows; otherwise h has no rows.
    """
    if activation in _COMPILED and extension.serves(x_RH, *(t for _, t in weights.items())):
        w = weights.map(Tensor.contiguous)
        gated = activation == "swiglu"
        y_RH, h_RU = torch.ops.megatron_samoe.grouped_mlp(
            x_RH.contiguous(), rows, w.w1, w.w2, w.b1, w.b2, gated, keep_hidden
        )
        return y_RH, h_RU
    h_RU = _products(x_RH, rows, weights.w1.flatten(1, -2), None)
    a_RF = activate(_with_bias(h_RU, rows, weights.b1), activation)
    return _products(a_RF, rows, weights.w2, weights.b2), h_RU if keep_hidden else h_RU[:0]


def grouped_mlp_backward(
    dy_RH: Tensor,
    x_RH: Tensor,
    h_RU: Tensor,
    rows: list[int] | ExpertRows,
    weights: ExpertWeights,
    activation: Activation,
    grads: ExpertWeights,
) -> Tensor:
    """Adds the weights' gradients to `grads` and returns dx_RH; h_RU is the forward's."""
    dy_RH, x_RH = dy_RH.contiguous(), x_RH.contiguous()
    if activation in _COMPILED and _serves_backward(x_RH, weights, grads):
        w = weights.map(Tensor.contiguous)
        dx_RH: Tensor = torch.ops.megatron_samoe.grouped_mlp_backward(
            dy_RH, x_RH, h_RU, rows, w.w1, w.w2, w.b1, activation == "swiglu", grads.w1, grads.w2, grads.b1, grads.b2
        )
        return dx_RH
    h_RU = _with_bias(h_RU, rows, weights.b1)
    da_RF = _products(dy_RH, rows, weights.w2.transpose(1, 2), None)
    dh_RU, a_RF = activation_backward(da_RF, h_RU, activation)
    add_outer_products(grads.w2, dy_RH, a_RF, rows)
    add_outer_products(grads.w1.flatten(1, -2), dh_RU, x_RH, rows)
    for bias_grad, d in ((grads.b1, dh_RU), (grads.b2, dy_RH)):
        if bias_grad is not None:
            _add_column_sums(bias_grad.flatten(1), d, rows)
    return _products(dh_RU, rows, weights.w1.flatten(1, -2).transpose(1, 2), None)


def _serves_backward(x_RH: Tensor, weights: ExpertWeights, grads: ExpertWeights) -> bool:
    """Returns whether the compiled op takes these: main gradients in fp32, each contiguous."""
    fits = all(g.dtype == torch.float32 and g.is_contiguous() for _, g in grads.items())
    return fits and extension.serves(x_RH, *(t for _, t in weights.items()))


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Returns a_RF: GELU of h, or SiLU of the first half times the second."""
    if activation in GELU_FORM:
        return F.gelu(h, approximate=GELU_FORM[activation])
    if h.dim() == 2 and extension.serves(h, cuda="swiglu") and not (torch.is_grad_enabled() and h.requires_grad):
        a_RF: Tensor = torch.ops.megatron_samoe.swiglu(h.contiguous())
        return a_RF
    gate, up = h.chunk(2, -1)
    return F.silu(gate).mul_(up)


def activation_backward(da: Tensor, h: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Returns dh, [R, F] or [R, 2F], for the gradient da_RF of `activate`'s result, and that result again."""
    if activation in GELU_FORM:
        return torch.ops.aten.gelu_backward(da, h, approximate=GELU_FORM[activation]), activate(h, activation)
    if extension.serves(da, h, cuda="swiglu"):
        dh, a = torch.ops.megatron_samoe.swiglu_backward(da.contiguous(), h.contiguous())
        return dh, a
    gate, up = h.chunk(2, -1)
    dh, silu = torch.empty_like(h), F.silu(gate)
    d_gate, d_up = dh.chunk(2, -1)
    torch.mul(da, silu, out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(da * up, gate))
    return dh, silu.mul_(up)


def _with_bias(h_RU: Tensor, rows: list[int] | ExpertRows, bias: Tensor | None) -> Tensor:
    if bias is None:
        return h_RU
    if isinstance(rows, ExpertRows):
        return h_RU + bias.flatten(1).index_select(0, rows.expert_of_row_R)
    return h_RU + bias.flatten(1).repeat_interleave(torch.tensor(rows), 0)


def _products(x_RK: Tensor, rows: list[int] | ExpertRows, w_eMK: Tensor, b_eM: Tensor | None) -> Tensor:
    """Returns [R, M]: expert e's rows times w[e] transposed, plus b[e]."""
    if isinstance(rows, ExpertRows):
        return grouped_products.products(x_RK, rows, w_eMK, b_eM)
    y_RM = x_RK.new_empty(x_RK.shape[0], w_eMK.shape[1])
    for e, part in _slices(rows):
        if b_eM is None:
            torch.mm(x_RK[part], w_eMK[e].t(), out=y_RM[part])
        else:
            torch.addmm(b_eM[e], x_RK[part], w_eMK[e].t(), out=y_RM[part])
    return y_RM


def add_outer_products(grad_eMK: Tensor, d_RM: Tensor, x_RK: Tensor, rows: list[int] | ExpertRows) -> None:
    """Adds d_e^T x_e to grad[e] for each expert's rows."""
    if isinstance(rows, ExpertRows):
        grouped_products.add_outer_products(grad_eMK, d_RM, x_RK, rows)
        return
    for e, part in _slices(rows):
        if grad_eMK.dtype == x_RK.dtype:
            grad_eMK[e].addmm_(d_RM[part].t(), x_RK[part])
        else:
            grad_eMK[e] += d_RM[part].t() @ x_RK[part]


def _add_column_sums(grad_eM: Tensor, d_RM: Tensor, rows: list[int] | ExpertRows) -> None:
    if isinstance(rows, ExpertRows):
        grouped_products.add_column_sums(grad_eM, d_RM, rows)
        return
    for e, part in _slices(rows):
        grad_eM[e] += d_RM[part].sum(0, dtype=grad_eM.dtype)


def _slices(rows: list[int]) -> list[tuple[int, slice]]:
    """Returns (expert, its rows) for the experts that have any."""
    ends = list(accumulate(rows))
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(rows, ends, strict=True)) if n]
