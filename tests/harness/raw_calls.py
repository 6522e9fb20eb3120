"""Raw calls of every op of ops/schemas.txt, well formed and with one thing wrong.

tests/unit/ops/test_wrong_indices.py looks at how they end.

`python -m tests.harness.raw_calls FIRST` makes the calls from number FIRST on in an address space of little more than
torch itself takes. It names each call before it makes it, so that of a process that died one knows by which.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.ops import extension, schemas
from tests.harness import emulated_cuda
from tests.harness.well_formed_calls import CALLS, Arguments, close_all, close_later, floats, ops

tried = ops  # whose calls are made: ops, or the emulated ones

INTEGERS = (0, -1, 1, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -1.0, 1e300, math.inf, -math.inf, math.nan)
DTYPES = [
    getattr(torch, name)
    for name in "float32 bfloat16 float16 float64 complex64 int64 int32 int16 int8 uint8 bool".split()
]
#: Sizes that a dim takes where another one is 0, so that there is no element: 2^31 - 1 pass for an int, and products of
#: the last ones are 0 in 64 bits.
HUGE = ((1 << 31) - 1, 1 << 32, 1 << 62)
#: What a call may take of addresses besides what is taken before, and how long it may run.
ROOM_BYTES, SECONDS = 1 << 30, 30


def _wrong_tensors(good: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Tensors in place of a good one, each with what it is."""
    shape = list(good.shape)
    for dtype in DTYPES:
        if dtype != good.dtype:
            yield f"as {dtype}", lambda dtype=dtype: good.to(dtype)
    yield from {
        "on meta": lambda: good.to("meta"),
        "without elements": lambda: good.new_empty(0),
        "as a scalar": lambda: good.new_zeros(()),
        "with a dim more": lambda: good[None].clone(),
        "of one dim": lambda: good.flatten().clone(),
        "sparse": lambda: good.to_sparse(),
        "of every second element": lambda: torch.stack((good, good), -1)[..., 0],
        "off its alignment": lambda: torch.cat((good.new_zeros(1), good.flatten()))[1:].view(shape),
    }.items()
    for dim, size in enumerate(shape):
        for new in {0, size - 1, size + 1, 2 * size} - {-1}:
            yield f"of {new} in dim {dim}", partial(good.new_zeros, [*shape[:dim], new, *shape[dim + 1 :]])
        for huge in HUGE:
            sizes = [*shape[:dim], huge, *shape[dim + 1 :]]
            yield f"repeated to {huge} in dim {dim}", lambda sizes=sizes: good.new_zeros(()).expand(sizes)
        for other in {*range(len(shape))} - {dim}:
            swapped = good.transpose(dim, other)
            yield f"transposed in {dim} and {other}", lambda t=swapped, d=dim, o=other: t.contiguous().transpose(d, o)
            for huge in HUGE:
                sizes = [0 if d == dim else huge if d == other else n for d, n in enumerate(shape)]
                yield f"of {sizes}", partial(good.new_empty, sizes)
    if shape:
        yield "repeated to overflow", lambda: good.new_zeros(()).expand([1 << 32] * max(2, len(shape)))
    if good.dtype in (torch.int64, torch.int32) and good.numel():
        bounds = torch.iinfo(good.dtype)
        for value in INTEGERS:
            if bounds.min <= value <= bounds.max:
                yield f"full of {value}", lambda value=value: torch.full_like(good, value)
                for place in {0, good.numel() - 1}:
                    changed = good.flatten().index_fill(0, torch.tensor(place), value).view(shape)
                    yield f"with {value} at {place}", changed.clone


def _wrong_integers(good: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    total, most = sum(good), (1 << 63) - 1
    for value in INTEGERS:
        for place in range(len(good)):
            changed = [*good[:place], value, *good[place + 1 :]]
            yield f"with {value} at {place}", lambda changed=changed: changed
        yield f"full of {value}", lambda value=value: [value] * len(good)
    sums_in_64_bits = [most, most, total + 2, *[0] * (len(good) - 3)]
    for wrong in ([], [*good, 0], sums_in_64_bits, [-1] * (len(good) or 1)):
        yield f"{wrong}", lambda wrong=wrong: wrong


def wrong_values(good: Any, type_name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Values in place of a good one, each with what it is."""
    if isinstance(good, Tensor):
        yield from _wrong_tensors(good)
    elif isinstance(good, bool):
        yield "flipped", lambda: not good
    elif isinstance(good, int):
        for value in INTEGERS:
            yield f"{value}", lambda value=value: value
    elif isinstance(good, float):
        for value in FLOATS:
            yield f"{value}", lambda value=value: value
    elif isinstance(good, str):
        for text in ("", "x", "9" * 4000, "\x00"):
            yield f"{text[:9]!r}", lambda text=text: text
    elif isinstance(good, list) and "int" in type_name:
        yield from _wrong_integers(good)
    elif isinstance(good, list) and "str" in type_name:
        for texts in ([], ["x"] * 3, ["9" * 99] * len(good), ["1 2 3 4"] * len(good), ["-1 -1 -1 -1"] * len(good)):
            yield f"{texts}"[:60], lambda texts=texts: texts
    elif isinstance(good, list):
        yield "empty", lambda: []
        yield "longer", lambda: [*good, *good[:1]]
        if good and isinstance(good[-1], Tensor):
            for name, wrong in _wrong_tensors(good[-1]):
                yield f"last {name}", lambda wrong=wrong: [*good[:-1], wrong()]
    if "Optional" in type_name:
        yield "None", lambda: None


def _combination_of_much() -> Arguments:
    rows = torch.zeros(1, 1, 1 << 22).expand(1000, 1, -1)
    return floats(1000, 1, 1000), rows, rows, torch.zeros(1, 1, 1 << 22).expand(1000, 1, -1)


#: Right calls for whose work there is not the memory.
TOO_MUCH: dict[str, Callable[[], Arguments]] = {
    "newton_schulz": lambda: (x := torch.zeros(1, 1, 1 << 25), 5, 3, 3.0, -4.0, 2.0, 1e-7, 1.0, torch.zeros_like(x)),
    "combine_banks_backward": _combination_of_much,
}


def calls() -> Iterator[tuple[str, str, str, Callable[[], Arguments]]]:
    """Every call: its op, what is wrong, the integer that was changed and to what, and its arguments."""
    for op, builders in CALLS.items():
        if tried is not ops and not hasattr(tried, op):
            continue
        schema = getattr(ops, op).default._schema
        for way, build in enumerate(builders):
            yield op, f"way {way}: as it should be", "", build
            for one in build.sizes:
                changes = [{one: 0}, {one: 1}]
                changes += [{one: 0, o: huge} for o in build.sizes for huge in (0, *HUGE) if o != one]
                for changed in changes:
                    yield op, f"way {way}: {changed}", "", partial(build, **changed)
            good = build()
            close_all()
            for place, argument in enumerate(schema.arguments):
                for name, wrong in wrong_values(good[place], str(argument.type)):

                    def change(build: Any = build, place: int = place, wrong: Any = wrong) -> Arguments:
                        arguments = build()
                        return (*arguments[:place], wrong(), *arguments[place + 1 :])

                    is_int = isinstance(good[place], int) and not isinstance(good[place], bool)
                    yield op, f"way {way}: {argument.name} {name}", f"{argument.name}={name}" if is_int else "", change
    for op, build in TOO_MUCH.items() if tried is ops else ():
        yield op, "too much for memory", "", build


def _outcome(op: str, build: Callable[[], Arguments]) -> str:
    try:
        arguments = build()
    except (RuntimeError, MemoryError, ValueError, TypeError, NotImplementedError, OverflowError) as error:
        return f"not made: {error}"
    try:
        result = getattr(tried, op)(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if op in ("shm_create", "nccl_create"):
        close_later(ops.all_to_all_close, result)
    if op == "decode_plan":
        close_later(ops.decode_plan_close, result)
    return "returned"


def main() -> None:
    """Makes the calls, each on a line: its number, op, what is wrong, and then how it ended."""
    global tried
    assert extension.available() and set(CALLS) == set(schemas.SCHEMAS)
    first, *library = sys.argv[1:]
    if library:
        _definitions = emulated_cuda.load_library(Path(library[0]))
        tried = getattr(torch.ops, emulated_cuda.NAMESPACE)
    torch.set_num_threads(2)
    torch.ones(1 << 20).sum()  # threads begin
    with open("/proc/self/statm", encoding="utf-8") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM_BYTES,) * 2)
    for number, (op, what, integer, build) in enumerate(calls()):
        if number < int(first):
            continue
        print(number, op, what, integer, sep="\t", end="\t", flush=True)
        signal.alarm(SECONDS)
        ops.set_products("fp32", 1 << 62, 1 << 62)
        print(_outcome(op, build).replace("\n", " "), flush=True)
        close_all()
        signal.alarm(0)


if __name__ == "__main__":
    main()
