"""Pipeline schedules as pure plans: for each rank, the order of its forward and backward passes.

A virtual stage is chunk c of pipeline rank r; a token passes stages c * pp + r = 0, 1, ... in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one chunk of the rank: "F" forwards or "B" backwards."""

    kind: Literal["F", "B"]
    chunk: int
    micro_batch: int


Plan = tuple[Action, ...]


def forward_plan(num_chunks: int, num_micro_batches: int) -> Plan:
    """Returns the plan of a pass without gradients; the same for all ranks."""
    return tuple(Action("F", c, m) for m in range(num_micro_batches) for c in range(num_chunks))


def gpipe_plan(num_micro_batches: int) -> Plan:
    """Returns all forwards, then all backwards (GPipe, arXiv:1811.06965): every micro-batch's activations are kept."""
    forwards = [Action("F", 0, m) for m in range(num_micro_batches)]
    return tuple(forwards + [Action("B", 0, m) for m in range(num_micro_batches)])


def one_f_one_b_plan(pp: int, rank: int, num_micro_batches: int) -> Plan:
    """Returns the 1F1B schedule (PipeDream-flush, arXiv:2104.04473, section 2.2): at most pp - rank micro-batches are
    in flight.
    """
    warmup = min(pp - rank - 1, num_micro_batches)
    plan = [Action("F", 0, m) for m in range(warmup)]
    for m in range(num_micro_batches - warmup):
        plan += [Action("F", 0, warmup + m), Action("B", 0, m)]
    return tuple(plan + [Action("B", 0, m) for m in range(num_micro_batches - warmup, num_micro_batches)])


def interleaved_plan(pp: int, rank: int, num_chunks: int, num_micro_batches: int) -> Plan:
    """Returns the interleaved schedule (arXiv:2104.04473, section 2.3): micro-batches in groups of pp, each group through
    one chunk after the other. The number of micro-batches must be a multiple of pp."""
    assert num_micro_batches % pp == 0
    total = num_chunks * num_micro_batches
    order = [
        (chunk, group * pp + m)
        for group in range(num_micro_batches // pp)
        for chunk in range(num_chunks)
        for m in range(pp)
    ]
    forwards = [Action("F", chunk, m) for chunk, m in order]
    backwards = [Action("B", num_chunks - 1 - chunk, m) for chunk, m in order]
    # With one group of micro-batches all forward passes come first, as in Megatron.
    warmup = total if num_micro_batches == pp else min(2 * (pp - rank - 1) + (num_chunks - 1) * pp, total)
    plan = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        plan += [forward, backward]
    return tuple(plan + backwards[total - warmup :])


def make_plan(schedule: str, pp: int, rank: int, num_chunks: int, num_micro_batches: int) -> Plan:
    """Returns a rank's plan of one training step."""
    if num_chunks > 1:
        return interleaved_plan(pp, rank, num_chunks, num_micro_batches)
    return gpipe_plan(num_micro_batches) if schedule == "gpipe" else one_f_one_b_plan(pp, rank, num_micro_batches)


def max_in_flight(plan: Plan) -> int:
    """Returns the largest number of passes whose activations a rank holds at once."""
    held = peak = 0
    for action in plan:
        held += 1 if action.kind == "F" else -1
        peak = max(peak, held)
    return peak


#: Idle share of a step from which users are warned.
MUCH_IDLE = 0.3


def bubble_fraction(pp: int, num_chunks: int, num_micro_batches: int) -> float:
    """Returns the idle share of a step in theory, for passes of equal cost: (pp - 1) / (chunks * micro-batches + pp -
    1).
    """
    return (pp - 1) / (num_chunks * num_micro_batches + pp - 1)
