"""The assignment problem: who plays which role so that the sum of scores is the largest."""

from __future__ import annotations

import torch
from torch import Tensor


def assigned(score_NN: Tensor) -> Tensor:
    """Returns [N], the column of each row, with the largest sum of scores (the Hungarian algorithm); of equal sums that nearest to the
    identity."""
    from scipy.optimize import linear_sum_assignment  # importing it takes a second

    own = torch.eye(len(score_NN), dtype=torch.float64) * (1e-9 * float(score_NN.abs().max()) + 1e-300)
    _, columns = linear_sum_assignment((score_NN.double() + own).numpy(), maximize=True)
    return torch.from_numpy(columns)


def assigned_in_groups(score_EE: Tensor, num_groups: int) -> Tensor:
    """Returns what `assigned` does, but that experts of one of the consecutive groups become those of one group."""
    if num_groups == 1:
        return assigned(score_EE)
    size, groups = len(score_EE) // num_groups, range(num_groups)
    score_GeGe = score_EE.view(num_groups, size, num_groups, size)
    within = [[assigned(score_GeGe[g, :, h]) for h in groups] for g in groups]
    score_GG = torch.stack(
        [torch.stack([score_GeGe[g, torch.arange(size), h, within[g][h]].sum() for h in groups]) for g in groups]
    )
    return torch.cat([h * size + within[g][h] for g, h in enumerate(assigned(score_GG).tolist())])
