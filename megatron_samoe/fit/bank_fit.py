"""Banks that replace the experts of many layers: least squares, weighted by the experts' inputs where these are known.

    min over A, T of   sum_{l,e}  || (W[l,e] - sum_p A[l,p] T[p,e]) C[l,e] ||^2,      C C' = M[l,e] = sum of x x'

is the squared error of the products W x over a text.

Without moments, C = 1, and the best P banks are the projection on the leading eigenvectors U of the layers' inner products
W W^T (Eckart and Young 1936): `fit_banks`. It needs only inner products, so weights need not be in memory together, and
gives banks as mixtures of the layers' experts. Any P rows of U U^T W span the same space; we take those of P well-chosen
layers, so that banks look like experts and these layers' coefficients are one-hot.

With moments M and the products K[l,e] = W[l,e] M[l,e] the fit needs no text, and with M of other inputs b and K = sum of
(W a) b' it is the fit of a matrix whose inputs have changed: `fit_target`. It starts from the fit without moments and alternates:
T and A are each the exact best while the other stays, so the error never grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError

#: Coefficients nearer to 0 or 1 than this are rounding.
ROUNDING = 1e-12
#: Share of a layer's mean moment that is added to each expert's, so that rare experts and unseen directions keep a weight.
DAMPING = 1e-3
#: Gain of a sweep, relative to the error, below which the fit has ended.
_GAIN = 1e-3


@dataclass(frozen=True)
class BankFit:
    """P banks, and the coefficients by which layers use them.

    Attributes:
        coefficients_LGP: W[l, g] is about sum_p coefficients[l, g, p] T[p, g]; G is 1, or each expert has its own.
        banks: without moments the mixture [P, G, L], T[p, g] = sum_l mixture[p, g, l] W[l, g]; with moments T itself, [P, E, U, D].
        lost_LG: squared error that the banks leave, of each group, or with moments of each expert.
        power_LG: the same without banks.
    """

    coefficients_LGP: Tensor
    banks: Tensor
    lost_LG: Tensor
    power_LG: Tensor

    @property
    def is_mixture(self) -> bool:
        """Whether the banks are given as mixtures of the layers' experts."""
        return self.banks.dim() == 3

    @property
    def relative_L(self) -> Tensor:
        """Root of the lost share of each layer's power."""
        return (self.lost_LG.sum(1) / self.power_LG.sum(1).clamp_min(1e-300)).sqrt()

    @property
    def relative(self) -> float:
        """The same of all layers."""
        return float((self.lost_LG.sum() / self.power_LG.sum().clamp_min(1e-300)).sqrt())


def fit_banks(gram_GLL: Tensor, num_banks: int) -> BankFit:
    """Returns the best banks for inner products of layers, [G, L, L] in fp64.

    Raises:
        ConfigError: more banks than layers.
    """
    num_layers = gram_GLL.shape[1]
    if not 1 <= num_banks <= num_layers:
        allowed = f"must be from 1 to the number of MoE layers that combine them, {num_layers}"
        raise ConfigError("--num-expert-banks", num_banks, allowed)
    basis_GLP = torch.linalg.eigh(gram_GLL.double()).eigenvectors[:, :, -num_banks:]
    solved = []
    for basis_LP in basis_GLP:
        anchor_PP = basis_LP[choose_anchors(basis_LP)]
        solved.append((_rounded(basis_LP @ torch.linalg.inv(anchor_PP)), _rounded(anchor_PP @ basis_LP.T)))
    a_GLP, mixture_GPL = (torch.stack(parts) for parts in zip(*solved, strict=True))
    return _of_mixture(gram_GLL, a_GLP, mixture_GPL, basis_GLP @ basis_GLP.transpose(1, 2))


def fit_set(gram_LL: Tensor, anchor: int | None, is_scaled: bool) -> BankFit:
    """Returns the one bank that layers share, in place of the best one: their average, or the experts of one of them.

    Args:
        anchor: the layer whose experts it takes.
        is_scaled: layers use it by their best factors; else by 1.
    """
    count = len(gram_LL)
    mixture_L = torch.full((count,), 1.0 / count).double()
    if anchor is not None:
        mixture_L = torch.nn.functional.one_hot(torch.tensor(anchor), count).double()
    along_L = gram_LL @ mixture_L
    a_L = along_L / (mixture_L @ along_L).clamp_min(1e-300) if is_scaled else torch.ones(count).double()
    return _of_mixture(gram_LL[None], a_L[None, :, None], mixture_L[None, None])


def _of_mixture(gram_GLL: Tensor, a_GLP: Tensor, mixture_GPL: Tensor, product_GLL: Tensor | None = None) -> BankFit:
    """Returns a fit whose banks are mixtures; `product` is coefficients times mixture, where it is known exactly."""
    product_GLL = a_GLP @ mixture_GPL if product_GLL is None else product_GLL
    rest_GLL = torch.eye(gram_GLL.shape[1], dtype=product_GLL.dtype) - product_GLL
    lost_LG = torch.einsum("gli,gij,glj->lg", rest_GLL, gram_GLL.double(), rest_GLL).clamp_min(0)
    return BankFit(a_GLP.transpose(0, 1), mixture_GPL.transpose(0, 1), lost_LG, gram_GLL.diagonal(dim1=1, dim2=2).T)


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


@dataclass(frozen=True)
class FitTarget:
    """The experts that banks replace: L layers of E matrices [U, D], in roles that all layers share.

    Attributes:
        cross_LEUD: sums of products' targets times inputs, W M where the inputs stayed.
        moment_LEDD: sums of inputs' outer products.
        power_LE: sums of targets' squares, so that an error is a share of it.
    """

    cross_LEUD: Tensor
    moment_LEDD: Tensor
    power_LE: Tensor

    @staticmethod
    def of_weights(w_LEUD: Tensor, moment_LEDD: Tensor, damping: float = DAMPING) -> FitTarget:
        """Returns the target W itself, weighted by moments."""
        moment_LEDD = damped(moment_LEDD.double(), damping)
        cross_LEUD = w_LEUD.double() @ moment_LEDD
        return FitTarget(cross_LEUD, moment_LEDD, (cross_LEUD * w_LEUD).sum((2, 3)))

    @staticmethod
    def of_outputs(
        w_LEUD: Tensor, cross_LEUD: Tensor, moment_LEDD: Tensor, power_LE: Tensor, damping: float = DAMPING
    ) -> FitTarget:
        """Returns the target of outputs for other inputs; where these say nothing, the target is W."""
        whole_LEDD = damped(moment_LEDD.double(), damping)
        more_LE = (whole_LEDD - moment_LEDD).diagonal(dim1=2, dim2=3)[..., :1, None]
        cross_LEUD = cross_LEUD.double() + w_LEUD.double() * more_LE
        power_LE = power_LE + (w_LEUD.double().square() * more_LE).sum((2, 3))
        return FitTarget(cross_LEUD, whole_LEDD, power_LE)

    def products(self, bank_PEUD: Tensor) -> Products:
        """Returns what the error is made of, for banks in fp64."""
        num_layers, E = self.power_LE.shape
        num_banks = len(bank_PEUD)
        own_LEPP = bank_PEUD.new_empty(num_layers, E, num_banks, num_banks)
        for role, bank_PUD in enumerate(bank_PEUD.transpose(0, 1)):
            for p, q in combinations_with_replacement(range(num_banks), 2):
                gram_DD = bank_PUD[p].T @ bank_PUD[q]
                own_L = torch.einsum("lij,ij->l", self.moment_LEDD[:, role], gram_DD)
                own_LEPP[:, role, p, q] = own_LEPP[:, role, q, p] = own_L
        return Products(own_LEPP, torch.einsum("peud,leud->lep", bank_PEUD, self.cross_LEUD), self.power_LE)


@dataclass(frozen=True)
class Products:
    """Weighted inner products of each role's banks with each other, [L, E, P, P], with the target, [L, E, P], and of the target
    with itself, [L, E]."""

    own_LEPP: Tensor
    along_LEP: Tensor
    power_LE: Tensor

    def lost(self, a_LGP: Tensor) -> Tensor:
        """Returns lost_LE for coefficients."""
        a_LP = a_LGP[:, 0]
        used_LE = torch.einsum("lp,lq,lepq->le", a_LP, a_LP, self.own_LEPP)
        return (used_LE - 2 * torch.einsum("lp,lep->le", a_LP, self.along_LEP) + self.power_LE).clamp_min(0)


def damped(moment_LEDD: Tensor, damping: float) -> Tensor:
    """Returns moments with a share of their layer's mean size added to each diagonal."""
    size_L = moment_LEDD.diagonal(dim1=2, dim2=3).mean((1, 2)).clamp_min(1e-30)
    unit_DD = torch.eye(moment_LEDD.shape[2], dtype=moment_LEDD.dtype)
    return moment_LEDD + damping * size_L[:, None, None, None] * unit_DD


def fit_target(target: FitTarget, starts: Sequence[Tensor], is_fixed: bool = False, max_sweeps: int = 20) -> BankFit:
    """Returns the best banks found from the best of several starts of coefficients [L, 1, P].

    Args:
        is_fixed: keep the coefficients, as tied sets do with ones.
    """
    begun = [_Solution.of(target, start.double(), _best_banks(target, start.double())) for start in starts]
    best = min(begun, key=lambda solution: float(solution.lost_LE.sum()))
    for _ in range(0 if is_fixed else max_sweeps):
        a_LGP = _best_coefficients(best)
        before, best = best, _Solution.of(target, a_LGP, _best_banks(target, a_LGP))
        if float(before.lost_LE.sum() - best.lost_LE.sum()) <= _GAIN * float(before.lost_LE.sum()):
            break
    fit = BankFit(best.a_LGP, best.bank_PEUD, best.lost_LE, target.power_LE)
    return fit if is_fixed else _centred(fit)


@dataclass(frozen=True)
class _Solution:
    """Banks with the coefficients that they are best for, and their products, from which better coefficients come."""

    a_LGP: Tensor
    bank_PEUD: Tensor
    products: Products
    lost_LE: Tensor

    @staticmethod
    def of(target: FitTarget, a_LGP: Tensor, bank_PEUD: Tensor) -> _Solution:
        products = target.products(bank_PEUD)
        return _Solution(a_LGP, bank_PEUD, products, products.lost(a_LGP))


def starts_of(w_LEUD: Tensor, moment_LEDD: Tensor, num_banks: int) -> list[Tensor]:
    """Returns coefficients to start from: of the best banks without weights, and of the best where all layers' inputs are the mean of
    their inputs (both are known in closed form)."""
    plain_LL = torch.einsum("leud,meud->lm", w_LEUD.double(), w_LEUD.double())
    grams = (plain_LL, pooled_gram(w_LEUD, moment_LEDD))
    return [fit_banks(gram_LL[None], num_banks).coefficients_LGP for gram_LL in grams]


def pooled_gram(w_LEUD: Tensor, moment_LEDD: Tensor) -> Tensor:
    """Returns inner products of layers' matrices, [L, L], weighted by the mean of each role's inputs."""
    w_LEUD = w_LEUD.double()
    mean_EDD = damped(moment_LEDD.double(), DAMPING).mean(0)
    gram_LL = torch.einsum("leud,meud->lm", w_LEUD, w_LEUD @ mean_EDD)
    return (gram_LL + gram_LL.T) / 2


def _best_banks(target: FitTarget, a_LGP: Tensor) -> Tensor:
    """Returns T of the least error: of each role P D equations, for all rows at once."""
    a_LP = a_LGP[:, 0]
    num_banks, (_, E, U, D) = a_LP.shape[1], target.cross_LEUD.shape
    banks = []
    for role in range(E):
        left = torch.einsum("lp,lq,lij->piqj", a_LP, a_LP, target.moment_LEDD[:, role]).reshape(num_banks * D, -1)
        right = torch.einsum("lp,lud->pdu", a_LP, target.cross_LEUD[:, role]).reshape(num_banks * D, U)
        # The text does not distinguish banks that layers use equally: the least of them are taken.
        left.diagonal().add_(1e-11 * left.diagonal().mean())
        banks.append(torch.cholesky_solve(right, torch.linalg.cholesky(left)).view(num_banks, D, U).transpose(1, 2))
    return torch.stack(banks, 1)


def _best_coefficients(solution: _Solution) -> Tensor:
    """Returns A of the least error: of each layer P equations."""
    own_LPP, along_LP1 = solution.products.own_LEPP.sum(1), solution.products.along_LEP.sum(1)[..., None]
    return torch.linalg.lstsq(own_LPP, along_LP1, driver="gelsd").solution.transpose(1, 2)


def _centred(fit: BankFit) -> BankFit:
    """Returns the same products with each bank's largest coefficient 1, so that banks are as large as experts."""
    a_LGP = fit.coefficients_LGP
    largest_1GP = a_LGP.gather(0, a_LGP.abs().argmax(0, keepdim=True))
    largest_1GP = torch.where(largest_1GP == 0, 1.0, largest_1GP)
    bank_PEUD = fit.banks * largest_1GP[0, 0][:, None, None, None]
    return replace(fit, coefficients_LGP=a_LGP / largest_1GP, banks=bank_PEUD)
