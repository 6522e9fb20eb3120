"""Banks that stand for the experts of many layers as well as P banks can, found from inner products alone.

With the experts of L layers as rows W[l], the best P-dimensional stand-in is the projection on the leading eigenvectors
U of the matrix of inner products W W^T (Eckart and Young 1936), so weights need not be in memory together. Any P rows of
U U^T W span the same space; we take those of P well-chosen layers, so that banks look like experts and these layers'
coefficients are one-hot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_samoe.interop.assignment import best_assignment

#: Coefficients nearer to 0 or 1 than this are rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class BankFit:
    """The best P banks of G groups (all experts together, or each expert).

    Attributes:
        coefficients_LGP: W[l, g] is about sum_p coefficients[l, g, p] T[p, g].
        mixture_PGL: T[p, g] = sum_l mixture[p, g, l] W[l, g].
        lost_LG: share of the squared norm of W[l, g] that the banks do not reproduce.
        norm_LG: squared norm of W[l, g].
    """

    coefficients_LGP: Tensor
    mixture_PGL: Tensor
    lost_LG: Tensor
    norm_LG: Tensor

    @property
    def relative_error_L(self) -> Tensor:
        """Norm of what each layer loses over the norm of its weights."""
        lost_L, norm_L = (self.lost_LG * self.norm_LG).sum(1), self.norm_LG.sum(1)
        return (lost_L / norm_L.clamp_min(1e-300)).sqrt()


def fit_banks(gram_GLL: Tensor, num_banks: int) -> BankFit:
    """Returns the best banks for inner products of layers, [G, L, L] in fp64."""
    assert 1 <= num_banks <= gram_GLL.shape[1]
    fits = [_fit_group(gram_LL.double(), num_banks) for gram_LL in gram_GLL]
    return BankFit(*(torch.stack(parts, 1) for parts in zip(*fits, strict=True)))


def _fit_group(gram_LL: Tensor, num_banks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    basis_LP = torch.linalg.eigh(gram_LL).eigenvectors[:, -num_banks:]
    anchors_P = choose_anchors(basis_LP)
    inverse_PP = torch.linalg.inv(basis_LP[anchors_P])
    coefficients_LP = _rounded(basis_LP @ inverse_PP)
    mixture_PL = _rounded(basis_LP[anchors_P] @ basis_LP.T)
    norm_L = gram_LL.diagonal()
    rest_LL = torch.eye(len(gram_LL), dtype=gram_LL.dtype) - basis_LP @ basis_LP.T
    lost_L = torch.einsum("li,ij,lj->l", rest_LL, gram_LL, rest_LL).clamp_min(0)
    return coefficients_LP, mixture_PL, lost_L / norm_L.clamp_min(1e-300), norm_L


def _rounded(t: Tensor) -> Tensor:
    return torch.where((t - t.round()).abs() < ROUNDING, t.round(), t)


def choose_anchors(basis_LP: Tensor) -> Tensor:
    """Returns P rows, rising, that are far from dependent: pivots of Gram-Schmidt on the rows."""
    rest = basis_LP.clone()
    chosen: list[int] = []
    for _ in range(basis_LP.shape[1]):
        lengths = rest.norm(dim=1)
        lengths[chosen] = -1.0
        # Of rows that are equal up to rounding the first, so that the choice does not hang on it.
        pivot = int((lengths >= lengths.max() * (1 - 1e-9)).nonzero()[0])
        chosen.append(pivot)
        direction = rest[pivot] / rest[pivot].norm()
        rest = rest - (rest @ direction)[:, None] * direction
    return torch.tensor(sorted(chosen))


def match_experts(grams: Sequence[Tensor], num_banks: int, max_sweeps: int = 10) -> Tensor:
    """Returns order_LE: expert order[l, e] of layer l plays role e, so that layers of one role share few directions.

    Layers are placed one after another, the one that fits best first: a role's score for an expert is the squared norm
    of the expert's projection on the P leading directions of the experts that play it so far. Then each layer is placed
    again against all others until nothing changes, and the order that P banks reproduce best is kept.

    Args:
        grams: inner products of all experts of all layers, [L, E, L, E] in fp64, of weights that are combined apart:
            each has P directions of its own, and all count alike, whatever their size.
    """
    grams = [gram / torch.einsum("lele->", gram).clamp_min(1e-300) for gram in grams]
    num_layers, num_experts = grams[0].shape[:2]
    order_LE = torch.arange(num_experts).repeat(num_layers, 1)

    def scores_of(placed: list[int], layer: int) -> Tensor:
        parts = [_role_scores(gram, order_LE, placed, layer, num_banks) for gram in grams]
        return torch.stack(parts).sum(0)

    placed, waiting = [0], list(range(1, num_layers))
    while waiting:
        scores = {layer: scores_of(placed, layer) for layer in waiting}
        best = max(waiting, key=lambda layer: float(scores[layer].amax(1).sum()))
        order_LE[best] = _assign(scores[best])
        placed.append(best)
        waiting.remove(best)
    kept, kept_loss = order_LE.clone(), _total_loss(grams, order_LE, num_banks)
    for _ in _sweeps(
        order_LE, range(1, num_layers), lambda layer, others: _assign(scores_of(others, layer)), max_sweeps
    ):
        loss = _total_loss(grams, order_LE, num_banks)
        if loss < kept_loss:
            kept, kept_loss = order_LE.clone(), loss
    return kept


def _sweeps(
    order_LE: Tensor, layers: Sequence[int], place: Callable[[int, list[int]], Tensor], max_sweeps: int
) -> Iterator[None]:
    """Places each layer again against all others, and yields after each sweep until one changes nothing."""
    for _ in range(max_sweeps):
        before = order_LE.clone()
        for layer in layers:
            order_LE[layer] = place(layer, [other for other in range(len(order_LE)) if other != layer])
        yield
        if torch.equal(order_LE, before):
            return


def match_to_mean(
    grams: Sequence[Tensor], num_groups: int = 1, anchor: int | None = None, max_sweeps: int = 20
) -> Tensor:
    """Returns order_LE: expert order[l, e] of layer l plays role e, so that experts of a role are near each other.

    A role's score for an expert is its inner product with the sum of those that play it, which is exact for one layer at a
    time: each is placed anew until nothing changes.

    Args:
        grams: as for `match_experts`.
        num_groups: consecutive groups that experts stay in.
        anchor: layer whose experts the roles are; the mean of all if not given.
    """
    grams = [gram / torch.einsum("lele->", gram).clamp_min(1e-300) for gram in grams]
    gram_LELE = torch.stack(grams).sum(0)
    num_layers, num_experts = gram_LELE.shape[:2]
    order_LE = torch.arange(num_experts).repeat(num_layers, 1)
    group_E = torch.arange(num_experts) // (num_experts // num_groups)
    is_apart_EE = group_E[:, None] != group_E

    def place(layer: int, others: Sequence[int]) -> Tensor:
        score_EE = torch.stack([gram_LELE[layer, :, other][:, order_LE[other]] for other in others]).sum(0)
        barrier = 2 * num_experts * float(score_EE.abs().max()) + 1.0
        return _assign(score_EE.masked_fill(is_apart_EE, -barrier))

    fixed = anchor or 0
    rest = [layer for layer in range(num_layers) if layer != fixed]
    for number, layer in enumerate(rest):
        order_LE[layer] = place(layer, [fixed] if anchor is not None else [fixed, *rest[:number]])
    if anchor is None:
        for _ in _sweeps(order_LE, rest, place, max_sweeps):
            pass
    return order_LE


def _assign(score_EE: Tensor) -> Tensor:
    # Equal scores keep the experts' own order.
    own = torch.eye(len(score_EE), dtype=score_EE.dtype) * (1e-9 * float(score_EE.abs().max()) + 1e-300)
    return torch.from_numpy(np.asarray(best_assignment((score_EE + own).numpy())))


def _role_scores(gram_LELE: Tensor, order_LE: Tensor, placed: list[int], layer: int, num_banks: int) -> Tensor:
    """Returns [expert of the layer, role]: squared norm of the projection on the role's leading directions."""
    members = order_LE[placed]  # [m, role]
    m = torch.tensor(placed)
    among_EMM = gram_LELE[m[:, None, None], members[:, None, :], m[None, :, None], members[None, :, :]].permute(2, 0, 1)
    values_EM, vectors_EMM = torch.linalg.eigh(among_EMM)
    count = min(num_banks, len(placed))
    values_EC, vectors_EMC = values_EM[:, -count:], vectors_EMM[:, :, -count:]
    inner_EEM = gram_LELE[layer][:, m[:, None], members].permute(0, 2, 1)  # [expert, role, m]
    along_EEC = torch.einsum("xrm,rmc->xrc", inner_EEM, vectors_EMC)
    useful_EC = values_EC > 1e-10 * values_EM[:, -1:].clamp_min(1e-300)
    return (along_EEC.square() / values_EC.clamp_min(1e-300) * useful_EC).sum(-1)


def role_gram(gram_LELE: Tensor, order_LE: Tensor, per_expert: bool) -> Tensor:
    """Returns inner products of layers, [G, L, L]: summed over roles (G = 1), or each role's (G = E)."""
    layers = torch.arange(len(order_LE))
    picked_LLE = gram_LELE[layers[:, None, None], order_LE[:, None, :], layers[None, :, None], order_LE[None, :, :]]
    gram_ELL = picked_LLE.permute(2, 0, 1)
    return gram_ELL if per_expert else gram_ELL.sum(0, keepdim=True)


def _total_loss(grams: Sequence[Tensor], order_LE: Tensor, num_banks: int) -> float:
    fits = [fit_banks(role_gram(gram, order_LE, per_expert=False), num_banks) for gram in grams]
    return sum(float((fit.lost_LG * fit.norm_LG).sum()) for fit in fits)
