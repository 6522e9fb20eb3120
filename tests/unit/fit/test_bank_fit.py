"""Banks and maps under a budget: the weighted fit is exact where a pool was planted, and its error is what it says; runs of layers are
the best of all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.bank_fit import FitTarget, damped, fit_banks, fit_target, starts_of
from megatron_samoe.fit.compress.sharing_plan import best_runs, sets_in_budget

L, E, U, D, P = 5, 3, 6, 7, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int = 1) -> Tensor:
    """Returns rows x of each expert, of very different sizes along the dims."""
    return random(L, E, 40, D, seed=seed) * torch.logspace(0, -2, D, dtype=torch.float64)


def moments(x_LEND: Tensor) -> Tensor:
    return x_LEND.transpose(2, 3) @ x_LEND


def error(w_LEUD: Tensor, a_LGP: Tensor, bank_PEUD: Tensor, moment_LEDD: Tensor) -> float:
    """Returns the weighted squared error, by C C' = M."""
    rest = w_LEUD - torch.einsum("lp,peud->leud", a_LGP[:, 0], bank_PEUD)
    return float((rest @ torch.linalg.cholesky(moment_LEDD)).square().sum())


@pytest.mark.parametrize("num_banks", [1, 2, 4])
def test_weights_help_where_it_counts(num_banks: int) -> None:
    w_LEUD, moment_LEDD = random(L, E, U, D), moments(inputs())
    fit = fit_target(FitTarget.of_weights(w_LEUD, moment_LEDD), starts_of(w_LEUD, moment_LEDD, num_banks))
    blind = fit_banks(torch.einsum("leud,meud->lm", w_LEUD, w_LEUD)[None], num_banks)
    banks = torch.einsum("pl,leud->peud", blind.banks[:, 0], w_LEUD)
    whole = damped(moment_LEDD, 1e-3)
    ours, theirs = (
        error(w_LEUD, *pair, whole) for pair in ((fit.coefficients_LGP, fit.banks), (blind.coefficients_LGP, banks))
    )
    assert ours < 0.97 * theirs
    assert float(fit.lost_LG.sum()) == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("num_banks", [1, 2])
def test_a_planted_pool_comes_back(num_banks: int) -> None:
    a_LGP, bank_PEUD = random(L, 1, num_banks, seed=4), random(num_banks, E, U, D, seed=5)
    w_LEUD = torch.einsum("lp,peud->leud", a_LGP[:, 0], bank_PEUD)
    moment_LEDD = moments(inputs())
    fit = fit_target(FitTarget.of_weights(w_LEUD, moment_LEDD), starts_of(w_LEUD, moment_LEDD, num_banks))
    again = torch.einsum("lp,peud->leud", fit.coefficients_LGP[:, 0], fit.banks)
    torch.testing.assert_close(again, w_LEUD, rtol=1e-5, atol=1e-5)
    assert fit.relative < 1e-5
    torch.testing.assert_close(fit.coefficients_LGP.abs().amax(0), torch.ones(1, num_banks, dtype=torch.float64))


def test_a_tied_set_is_the_best_mean() -> None:
    """With coefficients of one the fit is least squares over all rows, which a solver finds as well."""
    w_LEUD, x_LEND = random(L, E, U, D), inputs()
    fit = fit_target(FitTarget.of_weights(w_LEUD, moments(x_LEND), damping=0.0), [torch.ones(L, 1, 1)], is_fixed=True)
    for e in range(E):
        rows_ND = x_LEND[:, e].flatten(0, 1)
        wanted_NU = (x_LEND[:, e] @ w_LEUD[:, e].transpose(1, 2)).flatten(0, 1)
        best = torch.linalg.lstsq(rows_ND, wanted_NU).solution.T
        torch.testing.assert_close(fit.banks[0, e], best, rtol=1e-6, atol=1e-6)
    assert (fit.coefficients_LGP == 1).all()


def test_other_inputs_are_fitted_to_the_outputs() -> None:
    """The second matrix makes up for what the first one changed: it leaves less than the old weights do."""
    w_LEUD, x_LEND = random(1, E, U, D), inputs()[:1]
    changed = x_LEND @ (torch.eye(D, dtype=torch.float64) + 0.3 * random(D, D, seed=9))
    y_LENU = x_LEND @ w_LEUD.transpose(2, 3)
    target = FitTarget.of_outputs(
        w_LEUD, y_LENU.transpose(2, 3) @ changed, moments(changed), y_LENU.square().sum((2, 3)), 1e-9
    )
    fit = fit_target(target, [torch.ones(1, 1, 1)], is_fixed=True)
    left = (changed @ fit.banks.transpose(2, 3) - y_LENU).square().sum()
    assert left < 1e-3 * (changed @ w_LEUD.transpose(2, 3) - y_LENU).square().sum()
    assert float(fit.lost_LG.sum()) == pytest.approx(float(left), abs=1e-5 * float(target.power_LE.sum()))


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    w_LEUD, moment_LEDD = random(2, E, U, D), moments(inputs())[:2]
    moment_LEDD[0, 1] = moment_LEDD[1, 1] = 0
    fit = fit_target(FitTarget.of_weights(w_LEUD, moment_LEDD), [torch.ones(2, 1, 1)], is_fixed=True)
    # Both layers' dampings weigh their own.
    size_L = moment_LEDD.diagonal(dim1=2, dim2=3).mean((1, 2))
    mean = torch.einsum("l,lud->ud", size_L / size_L.sum(), w_LEUD[:, 1])
    torch.testing.assert_close(fit.banks[0, 1], mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("num_banks", [0, 5])
def test_no_more_banks_than_layers_can_be_fitted(num_banks: int) -> None:
    with pytest.raises(ConfigError, match=r"--num-expert-banks = .*from 1 to .* 4"):
        fit_banks(torch.eye(4)[None], num_banks)


def errors(seed: int, num_layers: int) -> torch.Tensor:
    error = torch.rand(num_layers, num_layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (error + error.T) / 2


def loss(error: torch.Tensor, runs: list[int]) -> float:
    total, start = 0.0, 0
    for size in runs:
        total += 2 / size * sum(float(error[i, j]) for i, j in combinations(range(start, start + size), 2))
        start += size
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_runs", [1, 2, 4, 6])
def test_runs_are_the_best_of_all(seed: int, max_runs: int) -> None:
    error = errors(seed, 6)
    every = [
        [b - a for a, b in zip((0, *cuts), (*cuts, 6), strict=True)]
        for count in range(max_runs)
        for cuts in combinations(range(1, 6), count)
    ]
    found = best_runs(error, max_runs)
    assert len(found) <= max_runs and sum(found) == 6
    assert loss(error, found) == pytest.approx(min(loss(error, runs) for runs in every))


def test_a_budget_is_a_share_or_bytes() -> None:
    assert sets_in_budget(0.5, 100, 8) == 4 and sets_in_budget(0.49, 100, 8) == 3
    assert sets_in_budget(450, 100, 8) == 4 and sets_in_budget(1 / 3, 100, 3) == 1


@pytest.mark.parametrize("budget", [0.1, 99, 0.0, 1.5, 800, -3])
def test_a_budget_that_no_map_meets_names_those_that_can_be(budget: float) -> None:
    allowed = r"a share of all experts, 0\.125 \(one set for all layers\) to 0\.875, or bytes, 100 to 700$"
    with pytest.raises(ConfigError, match=allowed):
        sets_in_budget(budget, 100, 8)
