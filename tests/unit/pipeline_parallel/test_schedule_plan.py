"""Schedule plans as pure data: complete, without cycles, as frugal as theory says, with channels that agree."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.pipeline_parallel.schedule_plan import (
    Action,
    Plan,
    bubble_fraction,
    forward_plan,
    gpipe_plan,
    interleaved_plan,
    make_plan,
    max_in_flight,
    one_f_one_b_plan,
)
from megatron_samoe.pipeline_parallel.schedules import Pipeline


@st.composite
def schedules(draw: st.DrawFn, largest_pp: int = 32) -> tuple[str, int, int, int]:
    """Draws (schedule, pp, chunks, micro-batches)."""
    schedule = draw(st.sampled_from(["1f1b", "gpipe", "interleaved"]))
    pp = draw(st.integers(2, largest_pp))
    if schedule == "interleaved":
        return "1f1b", pp, draw(st.integers(2, 4)), pp * draw(st.integers(1, 4))
    return schedule, pp, 1, draw(st.integers(1, 40))


def all_plans(schedule: str, pp: int, chunks: int, micro_batches: int) -> list[Plan]:
    return [make_plan(schedule, pp, rank, chunks, micro_batches) for rank in range(pp)]


def finish_times(plans: list[Plan], chunks: int, forward_s: int = 1, backward_s: int = 2) -> list[int]:
    """Returns when each rank is done, if an action starts as soon as its rank is free and its input there.

    Fails where some actions never get their input.
    """
    pp = len(plans)
    last_stage = pp * chunks - 1
    done: dict[tuple[str, int, int], int] = {}
    clock, place = [0] * pp, [0] * pp
    ready, waiting = deque(range(pp)), set(range(pp))
    while ready:
        rank = ready.popleft()
        waiting.discard(rank)
        while place[rank] < len(plans[rank]):
            action = plans[rank][place[rank]]
            stage = action.chunk * pp + rank
            if action.kind == "F":
                needs = None if stage == 0 else ("F", stage - 1, action.micro_batch)
            else:
                own = ("F", stage, action.micro_batch)
                assert own in done, "a backward pass needs its own forward pass"
                needs = own if stage == last_stage else ("B", stage + 1, action.micro_batch)
            if needs is not None and needs not in done:
                break
            start = max(clock[rank], done[needs] if needs is not None else 0)
            clock[rank] = start + (forward_s if action.kind == "F" else backward_s)
            done[action.kind, stage, action.micro_batch] = clock[rank]
            place[rank] += 1
            for neighbour in ((rank + 1) % pp, (rank - 1) % pp):
                if neighbour not in waiting:
                    ready.append(neighbour)
                    waiting.add(neighbour)
    assert place == [len(plan) for plan in plans], "every action gets its input: no cycle"
    return clock


@settings(deadline=None, max_examples=150)
@given(schedules())
def test_every_micro_batch_passes_every_stage_forwards_and_backwards_once(case: tuple[str, int, int, int]) -> None:
    _, _, chunks, micro_batches = case
    expected = {Action(kind, c, m) for kind in "FB" for c in range(chunks) for m in range(micro_batches)}  # type: ignore[arg-type]
    plans = all_plans(*case)
    for plan in plans:
        assert set(plan) == expected and len(plan) == len(expected)
    finish_times(plans, chunks)


@settings(deadline=None, max_examples=150)
@given(schedules())
def test_both_ends_of_a_channel_agree_on_the_order(case: tuple[str, int, int, int]) -> None:
    """A direction, and the way round from the last rank to the first, are channels of their own."""
    _, pp, chunks, _ = case
    plans = all_plans(*case)
    sent: dict[tuple[str, bool, int, int], list[str]] = {}
    received: dict[tuple[str, bool, int, int], list[str]] = {}
    for rank, plan in enumerate(plans):
        pipeline = Pipeline(rank, pp, chunks, None)
        for action in plan:
            if pipeline.receives(action):
                direction, what = pipeline.incoming(action)
                source = rank - (1 if direction == "forward" else -1)
                received.setdefault((direction, not 0 <= source < pp, source % pp, rank), []).append(what)
            stage, step = pipeline.virtual_stage(action.chunk), 1 if action.kind == "F" else -1
            if 0 <= stage + step < pp * chunks:
                direction, what = pipeline.outgoing(action)
                target = rank + (1 if direction == "forward" else -1)
                sent.setdefault((direction, not 0 <= target < pp, rank, target % pp), []).append(what)
    assert sent == received
    assert all(len(set(names)) == len(names) for names in sent.values()), "names tell messages apart"


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 1024), st.integers(1, 64), st.data())
def test_one_f_one_b_holds_at_most_the_stages_that_follow(pp: int, micro_batches: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, pp - 1))
    assert max_in_flight(one_f_one_b_plan(pp, rank, micro_batches)) == min(pp - rank, micro_batches)
    assert max_in_flight(gpipe_plan(micro_batches)) == micro_batches


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 64), st.integers(2, 4), st.integers(1, 4), st.data())
def test_interleaving_holds_its_warm_up_and_one_more(pp: int, chunks: int, groups: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, pp - 1))
    held = max_in_flight(interleaved_plan(pp, rank, chunks, groups * pp))
    if groups == 1:
        assert held == chunks * pp
    else:
        assert held == min(2 * (pp - rank - 1) + (chunks - 1) * pp + 1, chunks * groups * pp)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 64), st.integers(1, 4), st.integers(1, 40))
def test_one_f_one_b_holds_no_more_than_gpipe_and_takes_as_long(pp: int, backward_s: int, micro_batches: int) -> None:
    """Both idle for pp - 1 passes forwards and backwards: the bubble in theory."""
    expected = (micro_batches + pp - 1) * (1 + backward_s)
    for schedule in ("1f1b", "gpipe"):
        plans = all_plans(schedule, pp, 1, micro_batches)
        assert max(finish_times(plans, 1, 1, backward_s)) == expected
    idle = 1 - micro_batches * (1 + backward_s) / expected
    assert idle == pytest.approx(bubble_fraction(pp, 1, micro_batches))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(2, 4), st.integers(2, 4))
def test_interleaving_divides_the_bubble_by_the_chunks(pp: int, chunks: int, groups: int) -> None:
    micro_batches = groups * pp
    longest = max(finish_times(all_plans("1f1b", pp, chunks, micro_batches), chunks, 1, 2))
    work = 3 * chunks * micro_batches
    assert longest == work + 3 * (pp - 1)
    assert 1 - work / longest == pytest.approx(bubble_fraction(pp, chunks, micro_batches))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 32), st.integers(1, 4), st.integers(1, 20))
def test_a_pass_without_gradients_finishes_too(pp: int, chunks: int, micro_batches: int) -> None:
    plan = forward_plan(chunks, micro_batches)
    assert Counter(plan) == Counter(Action("F", c, m) for c in range(chunks) for m in range(micro_batches))
    finish_times([plan] * pp, chunks)
