"""Diagnosis of experts and banks: their gradients over batches, layers whose tokens coincide, and what layers are worth.

A bank's gradient is the sum of those of the layers that use it, weighed by their coefficients. If layers want the same of a
bank, their gradients to it point the same way; if one batch wants what the next wants, the mean over batches keeps the length
of each. Both are measured here, next to a model whose layers own their experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import DistillationConfig, LoggingConfig
from megatron_samoe.datasets.carried_tokenizer import with_carried
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.loading import load_newest
from megatron_samoe.errors import ConfigError
from megatron_samoe.moe.router import Routing
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT
from megatron_samoe.moe.sharing.way import Mixture
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.parsing import JsonObject, without_infinities
from megatron_samoe.training.batches import build_run_data
from megatron_samoe.training.checkpointing import load_run
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import compute_gradients

#: Ranks of matrices that what layers want is measured by.
RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class GradientView:
    """Gradients of N sets of E experts over batches.

    Attributes:
        rms_NE: root of an element's mean square, over batches and the expert's elements.
        alignment_NE: |mean over batches|^2 / mean of |batch|^2: 1 where all batches want the same, 1 / batches where they want
            unrelated things.
    """

    rms_NE: np.ndarray
    alignment_NE: np.ndarray


@dataclass(frozen=True)
class Diagnosis:
    """One checkpoint, over some batches.

    Attributes:
        worth_L: by how much the loss on the same batches rises, in nats, without what a layer's experts add.
        overlap_LL: share of a token's choices that two layers have in common, and chance_LL what only loads would give.
        choices_L: experts that a token visits in a layer.
        layers: gradients of each layer's effective experts. This and what follows is None where no layer has gradients of its own,
            as where layers share a set, or where they differ in the number of experts.
        banks: of each bank's; None without banks.
        similarity_LL: cosine between what two layers want of the expert of one number, without the noise of batches, which
            hides it; nan where batches of a layer have nothing in common.
        rank_shares_LR: share of what a layer wants of its experts' matrices that matrices of low rank hold, for each of `RANKS`:
            whether a low-rank part of the layer's own could give it.
        coefficients_2LP: weights of banks (w1, w2), mean over experts; None without banks.
    """

    iteration: int
    batches: int
    loss: float
    worth_L: np.ndarray
    overlap_LL: np.ndarray
    chance_LL: np.ndarray
    choices_L: np.ndarray
    layers: GradientView | None = None
    banks: GradientView | None = None
    similarity_LL: np.ndarray | None = None
    rank_shares_LR: np.ndarray | None = None
    coefficients_2LP: np.ndarray | None = None

    def to_json(self) -> JsonObject:
        """Returns plain values, arrays as nested lists, None for nan, which JSON does not know."""
        plain: JsonObject = without_infinities(
            asdict(
                self, dict_factory=lambda pairs: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in pairs}
            )
        )
        return plain


def diagnose(load: str, batches: int, data: DataConfig | None = None, ckpt_step: int | None = None) -> Diagnosis:
    """Returns the gradients of a checkpoint's experts on the next batches of its run's data, and what layers are worth.

    Args:
        load: folder of a run or of checkpoints.
        data: instead of the data of training.

    Raises:
        CheckpointError: no checkpoint is complete.
        ConfigError: it is a dense model.
    """
    checkpoint = CheckpointConfig(load=load, ckpt_step=ckpt_step, exit_on_missing_checkpoint=True, no_load_optim=True)

    def load_found(problems_of: store.Problems) -> tuple[Path, TrainSetup, TrainState]:
        directory = store.find_checkpoint(checkpoint, problems_of)
        assert directory is not None
        config = _config(from_mapping(store.read_config(directory), str(directory)), checkpoint, data)
        saved = store.read_train_state(directory, ("vocab_size", "iteration"))
        config = replace(config, training=replace(config.training, train_iters=saved["iteration"] + batches))
        setup = build_setup(config, saved["vocab_size"], single_process_state())
        return directory, setup, load_run(setup, initial_state(setup), directory)

    directory, setup, state = load_newest(load_found, single_process_state())
    iteration, consumed = state.iteration, state.consumed_samples
    tokenizer = tokenizer_of(with_carried(setup.config.data, directory, only_missing=True))
    run_data = build_run_data(setup.config, tokenizer, setup.parallel, (iteration, consumed))
    steps = list(islice(run_data.train_batches(consumed), batches))
    micro_batches = [micro_batch for step in steps for micro_batch in step]
    mixtures, routes = _comparable_mixtures(setup), _Routes(setup)
    sums = None if mixtures is None else _Sums(setup, mixtures)
    with routes:
        if sums is None:
            loss = evaluate(setup, micro_batches).mean
        else:
            loss = float(np.mean([compute_gradients(setup, state, step, sums.take)[0] for step in steps]))
    gradients = {} if sums is None else sums.found()
    return Diagnosis(iteration, batches, loss, worth_of_layers(setup, micro_batches), *routes.found(), **gradients)


def worth_of_layers(setup: TrainSetup, batches: Sequence[Batch]) -> np.ndarray:
    """Returns by how much the loss rises, in nats, without what each MoE layer adds, routed and shared experts; no token is
    dropped. A layer that has turned itself off is worth nothing."""
    full = evaluate(setup, batches).mean

    def nothing(_layer: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(outputs[0]), *outputs[1:])

    worth = []
    for layer in setup.model.moe_layers():
        hook = layer.moe.register_forward_hook(nothing)
        try:
            worth.append(evaluate(setup, batches).mean - full)
        finally:
            hook.remove()
    return np.array(worth)


def _config(config: PretrainConfig, checkpoint: CheckpointConfig, data: DataConfig | None) -> PretrainConfig:
    moe = config.moe
    if moe.expert_layout == "dense":
        raise ConfigError("--load", checkpoint.load, "is a dense model, which has no experts to diagnose")
    training = replace(config.training, recompute_granularity=None, skip_train=False)
    return replace(
        config,
        moe=replace(moe, samoe_combine="step") if moe.has_pool else moe,
        checkpoint=checkpoint,
        training=training,
        parallel=ParallelConfig(),
        logging=LoggingConfig(),
        distillation=DistillationConfig(),
        data=data or config.data,
    )


def _comparable_mixtures(setup: TrainSetup) -> list[Mixture] | None:
    """Returns what layers' experts are made of, if each layer has gradients of its own, and equal numbers of experts; None if not."""
    moe, layers = setup.config.moe, [layer.moe for layer in setup.model.moe_layers()]
    if (moe.shares_experts and not moe.has_pool) or len({layer.router.spec.shape.num_experts for layer in layers}) > 1:
        return None
    try:
        return [setup.model.mixture(layer) for layer in layers]
    except ConfigError:  # a way whose experts are not mixtures of banks
        return None


class _Sums:
    """Sums over batches of the gradients of layers' experts, and of banks' made of them."""

    def __init__(self, setup: TrainSetup, mixtures: Sequence[Mixture]):
        self.setup, self.count = setup, 0
        self._coefficients = [m.a_2GP for m in mixtures if m.a_2GP is not None]
        self.has_banks = len(self._coefficients) == len(mixtures)
        #: Of every other batch, [2, N, E, ...].
        self._halves: dict[str, list[Tensor]] = {}
        self._squares: dict[str, Tensor] = {}
        self._size = 0
        #: Inputs of the matrices among the gradients.
        self._inputs: dict[int, int] = {}

    def take(self) -> None:
        """Adds the gradients of the batch that was just computed."""
        found = self.setup.model.lender.layer_gradients()
        assert found is not None
        self.count += 1
        kinds = [name for name, _ in next(iter(found.values())).items()]
        by_kind = [torch.stack([dict(found[i].items())[name].float() for i in sorted(found)]) for name in kinds]
        self._inputs = {number: by_kind[number].shape[-1] for number, name in enumerate(kinds) if name.startswith("w")}
        self._add("layers", [g_LE.flatten(2) for g_LE in by_kind])
        if self.has_banks:
            weights = [torch.stack([c_2GP[ROW_OF_WEIGHT[name]] for c_2GP in self._coefficients]) for name in kinds]
            banks = [
                torch.einsum("lep,lex->pex", a_LGP.expand(-1, g_LE.shape[1], -1), g_LE.flatten(2))
                for a_LGP, g_LE in zip(weights, by_kind, strict=True)
            ]
            self._add("banks", banks)

    def _add(self, what: str, gradients: Sequence[Tensor]) -> None:
        squares_NE = sum(g.double().square().sum(2) for g in gradients)
        if what not in self._halves:
            self._halves[what] = [g.new_zeros(2, *g.shape) for g in gradients]
            self._squares[what] = torch.zeros_like(squares_NE)  # type: ignore[arg-type]
            self._size = sum(g.shape[2] for g in gradients)
        for halves, gradient in zip(self._halves[what], gradients, strict=True):
            halves[self.count % 2] += gradient
        self._squares[what] += squares_NE

    def found(self) -> dict[str, Any]:
        """Returns what a diagnosis says of gradients."""
        return {
            "layers": self._view("layers"),
            "banks": self._view("banks") if self.has_banks else None,
            "similarity_LL": cosines_without_noise(self._halves["layers"]).numpy(),
            "rank_shares_LR": self._rank_shares(),
            "coefficients_2LP": self._mean_coefficients(),
        }

    def _view(self, what: str) -> GradientView:
        squares_NE = self._squares[what] / self.count
        mean_NE = sum(h.sum(0).double().square().sum(2) for h in self._halves[what]) / self.count**2
        return GradientView(
            (squares_NE / self._size).sqrt().numpy(),
            (mean_NE / squares_NE.clamp_min(1e-300)).numpy(),  # type: ignore[union-attr]
        )

    def _rank_shares(self) -> np.ndarray:
        halves = self._halves["layers"]
        return rank_shares([halves[i].unflatten(3, (-1, inputs)) for i, inputs in self._inputs.items()]).numpy()

    def _mean_coefficients(self) -> np.ndarray | None:
        if not self.has_banks:
            return None
        return torch.stack([c_2GP.mean(1) for c_2GP in self._coefficients], dim=1).double().numpy()


def cosines_without_noise(halves: Sequence[Tensor]) -> Tensor:
    """Returns the cosines between what layers want of experts of one number, [L, L]; nan where that has no length.

    A gradient is what a layer wants and a batch's noise. Products of gradients of different batches have no noise in common,
    neither those of two layers nor those of one, which give the length of what it wants.

    Args:
        halves: gradients of all layers, [2, L, E, ...], each summed over batches that the other half has not seen.
    """
    products_LL = torch.stack([torch.einsum("lex,mex->lm", *half.double()) for half in halves]).sum(0)
    products_LL = (products_LL + products_LL.T) / 2
    lengths_L = torch.where(products_LL.diag() > 0, products_LL.diag(), torch.nan).sqrt()
    return products_LL / lengths_L / lengths_L[:, None]


def rank_shares(halves: Sequence[Tensor]) -> Tensor:
    """Returns the share of what layers want of matrices that matrices of each of `RANKS` hold, [L, R]; nan where that has no length.

    One half of the batches chooses the directions, and the other says how much is in them, so that noise is not taken for
    something of low rank. Noise makes the choice worse: with more batches shares grow.

    Args:
        halves: gradients of all layers, [2, L, E, rows, columns], as for `cosines_without_noise`.
    """
    held_LR, whole_L = torch.zeros(()), torch.zeros(())
    for half in halves:
        for choosing, judging in (half, half.flip(0)):
            # The directions come from random products.
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(choosing, q=min(RANKS[-1] + 8, *choosing.shape[-2:]))
            found = (s * (u.mT @ judging @ v).diagonal(dim1=-2, dim2=-1)).double().sum(-2).cumsum(-1)
            held_LR = held_LR + found[..., [min(rank, found.shape[-1]) - 1 for rank in RANKS]]
            whole_L = whole_L + (choosing * judging).double().sum((-3, -2, -1))
    return held_LR / torch.where(whole_L > 0, whole_L, torch.nan)[:, None]


class _Routes:
    """Counts which experts layers choose together, from their routers' own decisions."""

    def __init__(self, setup: TrainSetup):
        self._routers = [layer.moe.router for layer in setup.model.moe_layers()]
        self._chosen: dict[int, Tensor] = {}
        self._common_LL = torch.zeros(len(self._routers), len(self._routers), dtype=torch.float64)
        self._loads_LE: Tensor | None = None
        self._choices = 0.0

    def __enter__(self) -> _Routes:
        self._hooks = [
            router.register_forward_hook(lambda _, inputs, routing, number=number: self._take(number, routing))
            for number, router in enumerate(self._routers)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, number: int, routing: Routing) -> None:
        most = max(router.spec.shape.num_experts for router in self._routers)
        ids_TK = routing.ids_TK
        chosen_TE = torch.zeros(len(ids_TK), most + 1).scatter_(1, ids_TK.masked_fill(ids_TK < 0, most), 1.0)[:, :most]
        self._chosen[number] = chosen_TE
        if len(self._chosen) == len(self._routers):
            chosen_LTE = torch.stack([self._chosen[i] for i in range(len(self._routers))])
            self._common_LL += torch.einsum("lte,mte->lm", chosen_LTE, chosen_LTE).double()
            loads_LE = chosen_LTE.sum(1).double()
            self._loads_LE = loads_LE if self._loads_LE is None else self._loads_LE + loads_LE
            self._choices += float(len(ids_TK))
            self._chosen.clear()

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the share of choices that layers have in common, what only their loads would give, and choices per token."""
        assert self._loads_LE is not None
        per_token_L = self._loads_LE.sum(1) / self._choices
        per_LL = torch.minimum(per_token_L[:, None], per_token_L[None, :]).clamp_min(1e-9)
        rates_LE = self._loads_LE / self._choices
        return (
            (self._common_LL / self._choices / per_LL).numpy(),
            (rates_LE @ rates_LE.T / per_LL).numpy(),
            per_token_L.numpy(),
        )
