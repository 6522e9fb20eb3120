"""Raw calls of every op of ops/schemas.txt, well formed and with one thing wrong.

tests/unit/ops/test_wrong_indices.py looks at how they end.

`python -m tests.harness.raw_calls FIRST` makes the calls from number FIRST on in an address space of little more than
torch itself takes. It names each call before it makes it, so that of a process that died one knows by which.
"""

from __future__ import annotations

import inspect
import itertools
import math
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.ops import extension, schemas
from tests.harness import emulated_cuda

ops = torch.ops.megatron_samoe
tried = ops  # whose calls are made: ops, or the emulated ones
Arguments = tuple[Any, ...]

INTEGERS = (0, -1, 1, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -1.0, 1e300, math.inf, -math.inf, math.nan)
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
#: Sizes that a dim takes where another one is 0, so that there is no element: 2^31 - 1 pass for an int, and products of
#: the last ones are 0 in 64 bits.
HUGE = ((1 << 31) - 1, 1 << 32, 1 << 62)
#: What a call may take of addresses besides what is taken before, and how long it may run.
ROOM_BYTES, SECONDS = 1 << 30, 5


def _f(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float32).to(dtype)


def _i(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _int32(*shape: int) -> Tensor:
    return _i(*shape, dtype=torch.int32)


def _expert_stack(E: int, H: int, F: int, kind: torch.dtype = torch.float32) -> Arguments:
    """Index1 to gated, of gated experts with all that is optional."""
    scales = (_f(E, 2, F), _f(E, H)) if kind == torch.int8 else (None, None)
    w1, w2 = _f(E, 2, F, H, dtype=kind), _f(E, H, F, dtype=kind)
    return _i(E), _i(E), w1, scales[0], _f(E, 2, F), w2, scales[1], _f(E, H), _f(E), _f(E), True


def _router(E: int, H: int) -> Arguments:
    """Router to mixing_bias."""
    return _f(E, H), _f(1), _f(E), torch.ones(E), _f(2, H), _f(2)


def _norm(H: int) -> Arguments:
    return _f(H), _f(H), 1e-5, True


def _plan(T: int = 2, H: int = 8, V: int = 5, P: int = 16, R: int = 4, N: int = 1) -> int:
    norm = _norm(H)
    number = ops.decode_plan(_f(V, H), None, _f(P, H), _f(V, H), None, *norm, _f(P, R), _f(P, R), _f(T, H), _f(4096), N)
    _close_later(ops.decode_plan_close, number)
    return number


def _plan_with_layer(T: int = 2, H: int = 8, E: int = 2, V: int = 5, N: int = 1) -> int:
    number = _plan(T, H, V, N=N)
    ops.decode_plan_attention(number, *_decode_plan_attention()[1:])
    ops.decode_plan_mlp(number, *_decode_plan_mlp(H=H, E=E)[1:])
    return number


def _communicator(world: int = 1) -> int:
    handle = ops.shm_create(0, world, 0, 1.0)
    _close_later(ops.all_to_all_close, handle)
    return handle


_to_close: list[tuple[Callable[[int], None], int]] = []


def _close_later(close: Callable[[int], None], number: int) -> None:
    _to_close.append((close, number))


def _decode_attention(
    T: int, H: int, G: int, D: int, P: int, pages: int
) -> tuple[Arguments, Arguments, Arguments, Arguments]:
    qkv = _f(G, 4, D, H), None, _f(G * 4 * D), [_f(D) for _ in range(4)]
    return qkv, (_f(16, 4), _f(16, 4)), (_int32(T), _int32(T), _int32(1, pages)), (_f(P, G, D, 16), _f(P, G, 16, D))


def _decode_attention_block(T: int = 2, H: int = 8, G: int = 1, D: int = 4, P: int = 2, S: int = 4096) -> Arguments:
    qkv, angles, places, cache = _decode_attention(T, H, G, D, P, 1)
    return _f(T, H), *_norm(H), *qkv, *angles, *places, *cache, _f(H, G * 2 * D), None, _f(H), _f(S)


def _decode_plan_attention(G: int = 1, D: int = 4, P: int = 2) -> Arguments:
    qkv, _, _, cache = _decode_attention(2, 8, G, D, P, 1)
    return _plan(), *_norm(8), *qkv, *cache, _f(8, G * 2 * D), None, _f(8)


def _decode_plan_mlp(H: int = 8, F: int = 6, E: int = 2) -> Arguments:
    number = _plan(H=H)
    if H == 8:
        ops.decode_plan_attention(number, *_decode_plan_attention_of_no_plan())
    return number, *_norm(H), *_router(E, H), True, False, 1, 1, 1.0, 1, *_expert_stack(E, H, F)


def _decode_plan_attention_of_no_plan() -> Arguments:
    return _decode_plan_attention()[1:]


def _decode_linear(T: int, K: int, N: int, kind: torch.dtype, tokens: int) -> Arguments:
    ops.set_products("fp32", tokens, tokens)
    return _f(T, K), _f(N, K, dtype=kind), _f(N) if kind == torch.int8 else None, _f(N), _f(T, N), False


def _decode_experts(T: int, K: int, H: int, F: int, E: int, kind: torch.dtype, tokens: int) -> Arguments:
    """By whole products from a number of tokens on."""
    ops.set_products("fp32", tokens, tokens)
    stack = _expert_stack(E, H, F, kind)
    return _f(T, H), _i(T, K), _f(T, K), *stack, _f(T, K, H), True, _f(T, H), _f(4096)


def _grouped_mlp(E: int = 3, H: int = 3, F: int = 4, R: int = 2, dtype: torch.dtype = torch.float32) -> Arguments:
    weights = (_f(*shape, dtype=dtype) for shape in ((E, 2, F, H), (E, H, F), (E, 2, F), (E, H)))
    return _f(E * R, H, dtype=dtype), [R] * E, *weights, True, True


def _grouped_mlp_backward(
    E: int = 3, H: int = 3, F: int = 4, R: int = 2, dtype: torch.dtype = torch.float32
) -> Arguments:
    x, rows, w1, w2, b1, b2, _, _ = _grouped_mlp(E, H, F, R, dtype)
    grads = (torch.zeros(w.shape) for w in (w1, w2, b1, b2))
    return x.clone(), x, _f(E * R, 2 * F, dtype=dtype), rows, w1, w2, b1, True, *grads


def _gather_samples(D: int = 2, N: int = 1, S: int = 3, W: int = 4) -> Arguments:
    starts = torch.zeros(N + 1, 2, dtype=torch.int64)
    starts[1:, 1] = torch.arange(1, N + 1) * (W - 1) if W * N < 1 << 20 else 0
    return _i(4096, dtype=torch.uint8), _i(D), _int32(D) + 64, _int32(S), starts, [0] * N, 4, _i(N, W)


#: Types of weights, and the tokens from which whole products are taken.
_WAYS_OF_PRODUCTS = ((torch.float32, 1 << 62), (torch.bfloat16, 0), (torch.int8, 1 << 62))
_ONE_PART = [0], [16], [0], [16]
#: Well-formed calls, by their op; those of one op differ in their way through it. The letters are sizes.
CALLS: dict[str, tuple[Callable[..., Arguments], ...]] = {
    "instruction_set": (lambda: (),),
    "topk_gate": (lambda T=6, E=4, K=2, G=2: (_f(T, E), K, True, False, G, _f(T, E)),),
    "topk_gate_backward": (
        lambda T=6, E=4, K=2, G=2: (
            _f(T, E), _f(T), _f(T, K), _i(T, K), _f(T, K), _f(G, E), _f(), True, False, G,
        ),
        lambda T=6, E=4, K=2, G=2: (
            _f(T, E), _f(T), _f(T, K), _i(T, K), _f(T, K), _f(G, E), _f(), False, True, G,
        ),
    ),
    "make_permutation": (lambda T=3, K=2, E=4: (_i(T, K), E),),
    "permute": (lambda T=3, H=5, N=4, K=2: (_f(T, H), _i(N), K),),
    "unpermute": (lambda N=4, H=5, T=3, K=2: (_f(N, H), _f(T, K), _i(T, K)),),
    "unpermute_backward": (lambda N=4, H=5, T=3, K=2: (_f(T, H), _f(N, H), _f(T, K), _i(N), _i(T, K)),),
    "combine_banks": (
        lambda L=3, G=2, P=4, N=8: (_f(L, G, P), _f(P, G, N), _f(L, G, N)),
        lambda L=3, G=2, P=9, N=8: (_f(L, G, P), _f(P, G, N), _f(L, G, N, dtype=torch.bfloat16)),
    ),
    "combine_banks_backward": (lambda L=3, G=2, P=4, N=8: (_f(L, G, P), _f(P, G, N), _f(L, G, N), _f(P, G, N)),),
    "cross_entropy_parts": (lambda T=3, V=20: (_f(T, V), _i(T), 0),),
    "cross_entropy_backward": (lambda T=3, V=20: (_f(T, V), _i(T), 0, _f(T), _f(T)),),
    "grouped_mlp": (_grouped_mlp, lambda E=3, H=3, F=4, R=2: _grouped_mlp(E, H, F, R, torch.bfloat16)),
    "grouped_mlp_backward": (
        _grouped_mlp_backward, lambda E=3, H=3, F=4, R=2: _grouped_mlp_backward(E, H, F, R, torch.bfloat16),
    ),
    "swiglu": (lambda R=3, F=4: (_f(R, 2 * F),),),
    "swiglu_backward": (lambda R=3, F=4: (_f(R, F), _f(R, 2 * F)),),
    "adamw": (
        lambda N=5, runs=2: (
            [_f(N) for _ in range(runs)], [_f(N, dtype=torch.bfloat16) for _ in range(runs)],
            *([_f(N) for _ in range(runs)] for _ in range(3)), 0.1, 0.9, 0.95, 1e-8, 0.0, 1, 1.0,
        ),
    ),
    "decode_linear": tuple(
        lambda T=3, K=8, N=5, kind=kind, tokens=tokens: _decode_linear(T, K, N, kind, tokens)
        for kind, tokens in _WAYS_OF_PRODUCTS
    ),
    "decode_norm": (lambda T=3, H=8: (_f(T, H), *_norm(H), _f(T, H)),),
    "decode_attention_block": (_decode_attention_block,),
    "decode_experts": tuple(
        lambda T=3, K=2, H=8, F=6, E=2, kind=kind, tokens=tokens: _decode_experts(T, K, H, F, E, kind, tokens)
        for kind, tokens in _WAYS_OF_PRODUCTS
    ),
    "decode_route": (
        lambda T=3, H=8, E=4, K=2: (
            _f(T, H), *_norm(H), *_router(E, H), True, False, 2, 1, 1.0, _f(T, H), _i(T, K), _f(T, K), _f(T), _f(4096),
        ),
    ),
    "decode_moe_block": (
        lambda T=3, H=8, E=2, F=6, K=2: (
            _f(T, H), *_norm(H), _f(E, H), K, True, False, *_expert_stack(E, H, F), _f(4096),
        ),
    ),
    "decode_plan": (
        lambda T=2, H=8, V=5, P=16, R=4, N=1: (
            _f(V, H), None, _f(P, H), _f(V, H), None, *_norm(H), _f(P, R), _f(P, R), _f(T, H), _f(4096), N,
        ),
    ),
    "decode_plan_attention": (_decode_plan_attention,),
    "decode_plan_mlp": (_decode_plan_mlp,),
    "decode_plan_shared": (lambda E=1, F=6: (_plan_with_layer(), *_expert_stack(E, 8, F)),),
    "decode_plan_step": (
        lambda T=2, S=1, P=1, N=1: (
            _plan_with_layer(N=1), _i(T), _int32(T), _int32(T), _int32(S, P), _i(N), _f(N, 5),
        ),
    ),
    "decode_plan_close": (lambda: (_plan(),),),
    "combine_rows": (
        lambda N=3, K=8: ([_f(N, K) for _ in range(2)], [None] * 2, _f(2), _f(N, K), None),
        lambda N=3, K=8: (
            [_f(N, K, dtype=torch.int8) for _ in range(2)], [_f(N) for _ in range(2)], _f(2),
            _f(N, K, dtype=torch.int8), _f(N),
        ),
    ),
    "newton_schulz": (lambda B=2, M=3, N=5: (_f(B, M, N), 5, 3, 3.0, -4.0, 2.0, 1e-7, 1.0, _f(B, M, N)),),
    "has_bf16_product": (lambda: (),),
    "set_products": (lambda: ("fp32", 4, 4),),
    "build_sample_index": (lambda D=2, S=3, N=2: (_int32(D) + 9, _int32(S), 4, _i(N + 1, 2)),),
    "build_blending_index": (
        lambda D=2, N=5: (_f(D, dtype=torch.float64), _i(D) + 8, _i(N, dtype=torch.int16), _i(N)),
    ),
    "gather_samples": (_gather_samples,),
    "shuffle_legacy": (lambda N=9: (_i(N), _int32(624), 624),),
    "all_to_all_address": (lambda: (_communicator(),),),
    "all_to_all_connect": (lambda: (_communicator(), [""]), lambda: (_communicator(2), ["", "x"])),
    "all_to_all_start": (
        lambda N=4: (_communicator(), _f(N), _f(N), [], [4 * N], [], [4 * N], 1.0),
        lambda: (_communicator(), _f(4), _f(4), *_ONE_PART, 1.0),
        lambda: (_communicator(2), _f(8), _f(8), [], [16, 16], [], [16, 16], 0.1),
    ),
    "all_to_all_finish": (lambda: (_communicator(), 1, 0.1),),
    "all_to_all_abort": (lambda: (_communicator(), "so"),),
    "all_to_all_close": (lambda: (_communicator(),),),
    "shm_create": (lambda: (0, 1, 0, 1.0),),
    "shm_stage_rows": (lambda T=3, H=8, N=4: (_communicator(), _f(T, H), _i(N), 2, 1.0),),
    "nccl_problem": (lambda: (),),
    "nccl_library": (lambda: (),),
    "nccl_create": (lambda: (0, 1, torch.device("cpu"), 0, 1.0),),
    "nccl_start_even": (lambda N=4: (_communicator(), _f(N), _f(N)),),
    "nccl_start_hops": (
        lambda N=4: (_communicator(), _f(N), _f(N), _f(N), [0, 0, 0, 16], [0, 0, 0, 16], [0, 1, 0, 16], [0, 1, 0, 16]),
    ),
    "nccl_use_staging": (lambda N=4: (_communicator(), _f(N), 0.1),),
    "nccl_enqueue": (lambda: (_communicator(), 0.1),),
    "nccl_position": (lambda: (_communicator(),),),
}  # fmt: skip


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
            yield (
                f"of {new} in dim {dim}",
                lambda dim=dim, new=new: good.new_zeros([*shape[:dim], new, *shape[dim + 1 :]]),
            )
        for huge in HUGE:
            yield (
                f"repeated to {huge} in dim {dim}",
                lambda dim=dim, huge=huge: good.new_zeros(()).expand([*shape[:dim], huge, *shape[dim + 1 :]]),
            )
        for other in range(len(shape)):
            if other != dim:
                yield (
                    f"transposed in {dim} and {other}",
                    lambda dim=dim, other=other: good.transpose(dim, other).clone().transpose(dim, other),
                )
                for huge in HUGE:
                    sizes = [0 if d == dim else huge if d == other else n for d, n in enumerate(shape)]
                    yield f"of {sizes}", lambda sizes=sizes: good.new_empty(sizes)
    if shape:
        yield "repeated to overflow", lambda: good.new_zeros(()).expand([1 << 32] * max(2, len(shape)))
    if good.dtype in (torch.int64, torch.int32) and good.numel():
        bounds = torch.iinfo(good.dtype)
        for value in INTEGERS:
            if bounds.min <= value <= bounds.max:
                yield f"full of {value}", lambda value=value: torch.full_like(good, value)
                for place in {0, good.numel() - 1}:
                    yield f"with {value} at {place}", lambda value=value, place=place: _with_entry(good, place, value)


def _with_entry(good: Tensor, place: int, value: int) -> Tensor:
    changed = good.clone()
    changed.view(-1)[place] = value
    return changed


def _wrong_integers(good: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    total, most = sum(good), (1 << 63) - 1
    for value in INTEGERS:
        for place in range(len(good)):
            yield (
                f"with {value} at {place}",
                lambda value=value, place=place: [*good[:place], value, *good[place + 1 :]],
            )
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
    return _f(1000, 1, 1000), rows, rows, torch.zeros(1, 1, 1 << 22).expand(1000, 1, -1)


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
            sizes = inspect.signature(build).parameters
            letters = [name for name in sizes if len(name) == 1]
            for one in letters:
                for size in (0, 1):
                    yield (
                        op,
                        f"way {way}: {one} = {size}",
                        "",
                        lambda build=build, one=one, size=size: build(**{one: size}),
                    )
                for other, huge in itertools.product(letters, (0, *HUGE)):
                    if other != one:
                        changed = {one: 0, other: huge}
                        yield op, f"way {way}: {changed}", "", lambda build=build, changed=changed: build(**changed)
            good = build()
            _close_all()
            for place, argument in enumerate(schema.arguments):
                for name, wrong in wrong_values(good[place], str(argument.type)):

                    def change(build: Any = build, place: int = place, wrong: Any = wrong) -> Arguments:
                        arguments = build()
                        return (*arguments[:place], wrong(), *arguments[place + 1 :])

                    is_int = isinstance(good[place], int) and not isinstance(good[place], bool)
                    yield op, f"way {way}: {argument.name} {name}", f"{argument.name}={name}" if is_int else "", change
    for op, build in TOO_MUCH.items() if tried is ops else ():
        yield op, "too much for memory", "", build


def _close_all() -> None:
    while _to_close:
        close, number = _to_close.pop()
        close(number)


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
        _close_later(ops.all_to_all_close, result)
    if op == "decode_plan":
        _close_later(ops.decode_plan_close, result)
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
        _close_all()
        signal.alarm(0)


if __name__ == "__main__":
    main()
