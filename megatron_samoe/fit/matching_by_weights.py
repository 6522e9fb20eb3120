"""A common numbering of layers' experts by their weights only, from inner products: no text is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_samoe.config.sharing_map import Way
from megatron_samoe.fit.assignment import assigned, assigned_in_groups
from megatron_samoe.fit.bank_fit import fit_banks


def match_by_weights(
    grams: Sequence[Tensor], way: Way, num_banks: int, num_groups: int = 1, anchor: int | None = None
) -> Tensor:
    """Returns order_LE of `match_experts` where layers mix banks of their own, of `match_to_mean` where they share a set."""
    if way.combines and num_groups == 1:
        return match_experts(grams, num_banks)
    return match_to_mean(grams, num_groups, anchor)


def match_experts(grams: Sequence[Tensor], num_banks: int, max_sweeps: int = 10) -> Tensor:
    """Returns order_LE: expert order[l, e] of layer l plays role e, so that layers of one role share few directions.

    Layers are placed one after another, the one that fits best first: a role's score for an expert is the squared norm
    of the expert's projection on the P leading directions of the experts that play it so far. Then each layer is placed
    again against all others until nothing changes, and the order that P banks reproduce best is kept.

    Args:
        grams: inner products of all experts of all layers, [L, E, L, E] in fp64, of weights that are combined apart:
            each has P directions of its own, and all have the same weight, whatever their size.
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
        order_LE[best] = assigned(scores[best].T)
        placed.append(best)
        waiting.remove(best)
    kept, kept_loss = order_LE.clone(), _total_loss(grams, order_LE, num_banks)
    for _ in _sweeps(
        order_LE, range(1, num_layers), lambda layer, others: assigned(scores_of(others, layer).T), max_sweeps
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
        num_groups: consecutive groups of experts, which stay together.
        anchor: layer whose experts the roles are; the mean of all if not given.
    """
    grams = [gram / torch.einsum("lele->", gram).clamp_min(1e-300) for gram in grams]
    gram_LELE = torch.stack(grams).sum(0)
    num_layers, num_experts = gram_LELE.shape[:2]
    order_LE = torch.arange(num_experts).repeat(num_layers, 1)

    def place(layer: int, others: Sequence[int]) -> Tensor:
        score_EE = torch.stack([gram_LELE[layer, :, other][:, order_LE[other]] for other in others]).sum(0)
        return assigned_in_groups(score_EE.T, num_groups)

    fixed = anchor or 0
    rest = [layer for layer in range(num_layers) if layer != fixed]
    for number, layer in enumerate(rest):
        order_LE[layer] = place(layer, [fixed] if anchor is not None else [fixed, *rest[:number]])
    if anchor is None:
        for _ in _sweeps(order_LE, rest, place, max_sweeps):
            pass
    return order_LE


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
    return sum(float(fit.lost_LG.sum()) for fit in fits)
