"""What a model decides rather than computes: experts chosen, values clipped. Where layouts differ, the first decision that
differs, and by how little: a tie, which rounding may decide either way, or a fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_samoe.models.attention import SelfAttention
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import Group, ParallelState

#: Relative to the largest number that a decision compares: what the order of a sum moves in fp32. A decision by less is a tie.
ROUNDING = 1e-5

#: Optimizer step, layer, sequence of the global batch, and what is decided there; in the order in which it is.
Place = tuple[int, int, int, str]


@dataclass(frozen=True)
class Decision:
    """The decisions of one layer for one sequence.

    Attributes:
        taken: whether each alternative was taken, [S, ...].
        compared: the numbers that decide, in that shape.
        threshold: what a number is compared with, if with anything.
        among_others: whether numbers are compared with the others of their row.
    """

    taken: Tensor
    compared: Tensor
    threshold: float | None
    among_others: bool


@dataclass
class Choices:
    """The decisions of this rank, by place; of clipped values the parts, by first head and tokens."""

    whole: dict[Place, Decision] = field(default_factory=dict)
    parts: dict[Place, dict[tuple[int, tuple[int, ...]], Tensor]] = field(default_factory=dict)
    clip: float = 0.0

    def gathered(self, world: Group) -> dict[Place, Decision]:
        """Returns the decisions of all ranks, on every rank; ranks call it together."""
        found: dict[Place, Decision] = {}
        parts: dict[Place, dict[tuple[int, tuple[int, ...]], Tensor]] = {}
        for whole, own in world.all_gather_object((self.whole, self.parts)):
            found.update(whole)
            for place, pieces in own.items():
                parts.setdefault(place, {}).update(pieces)
        for place, pieces in parts.items():
            values = _joined(pieces)
            found[place] = Decision(values > self.clip, values, self.clip, among_others=False)
        return found


@dataclass(frozen=True)
class Difference:
    """The first decisions that differ; those that may follow from them are only counted.

    Attributes:
        place: the first of all.
        number: those that differ first for each sequence, in the step of the first of all.
        margin: the largest of their distances, relative to the numbers compared, from deciding the other way.
        total: decisions that differ in all places.
        decisions: all that were compared.
    """

    place: Place
    number: int
    margin: float
    total: int
    decisions: int

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone can have decided."""
        return self.margin <= ROUNDING

    def __str__(self) -> str:
        step, layer, sample, what = self.place
        kind = "a tie, which rounding decides" if self.is_tie else "no tie: what it compares differs"
        return (
            f"discrete choices differ, first {what} at step {step}, layer {layer}, sequence {sample}: {self.number} before others "
            f"can follow, by a margin of at most {self.margin:.1e} ({kind}); {self.total} of {self.decisions} in all"
        )


@contextlib.contextmanager
def recorded_choices() -> Iterator[Choices]:
    """Records what training decides inside the context."""
    choices = Choices()
    route, attend = Router.forward, SelfAttention.forward

    def forward(router: Router, x_TH: Tensor, context: ForwardContext, *args: Any) -> Any:
        select = router.select

        def recorded(logits_TE: Tensor, num_sequences: int) -> Any:
            gate = select(logits_TE, num_sequences)
            _note_experts(choices, router, context, logits_TE.detach(), gate.ids_TK)
            return gate

        with mock.patch.object(router, "select", recorded):
            return route(router, x_TH, context, *args)

    def attention(module: SelfAttention, x_TH: Tensor, inputs: Any, context: ForwardContext) -> Tensor:
        if module.config.clip_qkv is None:
            return attend(module, x_TH, inputs, context)
        with _Clamps() as clamps:
            y_TH = attend(module, x_TH, inputs, context)
        choices.clip = module.config.clip_qkv
        for name, values_BSAD in zip(("queries", "keys", "values"), clamps.seen, strict=True):
            _note_clipped(choices, module.qkv.state, module.layer, context, name, values_BSAD)
        return y_TH

    with mock.patch.object(Router, "forward", forward), mock.patch.object(SelfAttention, "forward", attention):
        yield choices


def first_difference(actual: dict[Place, Decision], expected: dict[Place, Decision]) -> Difference | None:
    """Returns where the decisions of two runs differ first, or None where all are the same."""
    assert actual.keys() == expected.keys() and expected, "both runs have the same places"
    counts = {place: int((expected[place].taken != actual[place].taken).sum()) for place in sorted(expected)}
    flipped = [place for place, count in counts.items() if count]
    if not flipped:
        return None
    firsts: dict[int, Place] = {}
    for place in flipped:  # within a step, what a sequence's decision changes is decided for it in later layers
        if place[0] == flipped[0][0]:
            firsts.setdefault(place[2], place)
    margin = max(_margin(expected[place], actual[place]) for place in firsts.values())
    decisions = sum(decision.taken.numel() for decision in expected.values())
    number = sum(counts[place] for place in firsts.values())
    return Difference(flipped[0], number, margin, sum(counts.values()), decisions)


@contextlib.contextmanager
def telling_ties(actual: dict[Place, Decision], expected: dict[Place, Decision]) -> Iterator[None]:
    """Adds to the message of a comparison that fails which decision differed first, and whether it was a tie."""
    try:
        yield
    except AssertionError as error:
        difference = first_difference(actual, expected)
        raise AssertionError(f"{error}\n{difference or 'every discrete choice is the same in both runs'}") from None


class _Clamps(TorchFunctionMode):
    """Keeps what is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clamp:
            self.seen.append(args[0].detach())
        return func(*args, **(kwargs or {}))


def _note_experts(choices: Choices, router: Router, context: ForwardContext, logits_TE: Tensor, ids_TK: Tensor) -> None:
    if context.random is None:
        return
    config = router.config
    taken_TE = torch.zeros(logits_TE.shape[0], logits_TE.shape[1] + 1, dtype=torch.bool)
    taken_TE.scatter_(1, ids_TK.where(ids_TK >= 0, logits_TE.shape[1]), True)
    key_TE = None if config.moe_router_score_function == "relu" else router.rule().key(logits_TE)
    compared_TE = logits_TE if key_TE is None else key_TE
    rows = (t.clone().chunk(context.batch_size) for t in (taken_TE[:, :-1], compared_TE))
    # A number must be positive, besides being among the largest or without regard to others.
    score = config.moe_router_score_function
    threshold = 0.0 if score in ("norm", "relu") else None
    for sample, taken, compared in zip(context.random.samples, *rows, strict=True):
        place = (context.random.iteration, router.spec.layer, sample, "expert choices")
        choices.whole[place] = Decision(taken, compared, threshold, among_others=score != "relu")


def _note_clipped(
    choices: Choices, state: ParallelState, layer: int, context: ForwardContext, name: str, values_BSAD: Tensor
) -> None:
    if context.random is None:
        return
    length = values_BSAD.shape[1] * state.cp.size
    tokens = tuple(n for start, stop in state.token_share.spans(length) for n in range(start, stop))
    for sample, values in zip(context.random.samples, values_BSAD.abs(), strict=True):
        place = (context.random.iteration, layer, sample, f"clipped {name}")
        choices.parts.setdefault(place, {})[state.tp.rank * values.shape[1], tokens] = values.clone()


def _joined(pieces: dict[tuple[int, tuple[int, ...]], Tensor]) -> Tensor:
    """Returns [S, A, D] of the parts [s, a, D] that ranks have."""
    heads = max(first + part.shape[1] for (first, _), part in pieces.items())
    length = 1 + max(max(tokens) for _, tokens in pieces)
    sample = next(iter(pieces.values()))
    whole = sample.new_full((length, heads, sample.shape[2]), float("nan"))
    for (first, tokens), part in pieces.items():
        whole[list(tokens), first : first + part.shape[1]] = part
    assert not whole.isnan().any()
    return whole


def _margin(one: Decision, other: Decision) -> float:
    """Returns by how much, relative to what is compared, decisions that differ were made in the first of two runs."""
    differ, compared = one.taken != other.taken, one.compared.double()
    largest = 0.0
    for row in differ.flatten(1).any(1).nonzero().flatten().tolist():
        numbers, flipped = compared[row].flatten(), differ[row].flatten()
        finite = numbers[numbers.isfinite()]
        distances = torch.full_like(numbers, float("inf"))
        if one.threshold is not None:
            distances = (numbers - one.threshold).abs()
        left, right = flipped & one.taken[row].flatten(), flipped & other.taken[row].flatten()
        if one.among_others and left.any() and right.any():  # one in place of another
            between = (numbers[:, None] - numbers[None, :]).abs()
            distances[left] = torch.minimum(distances[left], between[left][:, right].min(1).values)
            distances[right] = torch.minimum(distances[right], between[right][:, left].min(1).values)
        scale = max(finite.abs().max().item(), abs(one.threshold or 0.0), 1e-30)
        largest = max(largest, (distances[flipped].max() / scale).item())
    return largest
