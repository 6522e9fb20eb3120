"""Well-formed calls of every op of ops/schemas.txt, which raw_calls.py makes as they are and with one thing wrong.

Most are rows of well_formed_calls.yaml; what is made by a call of an op, or of arguments that depend on each other, stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.harness.tables import table

ops = torch.ops.megatron_samoe
Arguments = tuple[Any, ...]
Sizes = dict[str, int]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0.5, dtype=torch.float32).to(dtype)


def _i(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


_int32 = partial(_i, dtype=torch.int32)
#: Tensors by the first letter of their description.
_TENSORS: dict[str, Callable[..., Tensor]] = {
    "f": floats,
    "b": partial(floats, dtype=torch.bfloat16),
    "d": partial(floats, dtype=torch.float64),
    "q": partial(floats, dtype=torch.int8),
    "l": _i,
    "s": _int32,
    "h": partial(_i, dtype=torch.int16),
}


def _expert_stack(kind: str, E: int, H: int, F: int) -> Arguments:
    """Index1 to gated, of gated experts with all that is optional."""
    scales = (floats(E, 2, F), floats(E, H)) if kind == "q" else (None, None)
    w1, w2 = _TENSORS[kind](E, 2, F, H), _TENSORS[kind](E, H, F)
    return _i(E), _i(E), w1, scales[0], floats(E, 2, F), w2, scales[1], floats(E, H), floats(E), floats(E), True


def _router(E: int, H: int) -> Arguments:
    """Router to mixing_bias."""
    return floats(E, H), floats(1), floats(E), torch.ones(E), floats(2, H), floats(2)


def _norm(H: int) -> Arguments:
    return floats(H), floats(H), 1e-5, True


def _heads(G: int, D: int, H: int) -> Arguments:
    """The projection of queries, keys and values, to the norms of heads."""
    return floats(G, 4, D, H), None, floats(G * 4 * D), [floats(D) for _ in range(4)]


def _plan(H: int = 8) -> Arguments:
    (call,) = CALLS["decode_plan"]
    number = ops.decode_plan(*call(H=H))
    close_later(ops.decode_plan_close, number)
    return (number,)


def _plan_with_attention(H: int = 8) -> Arguments:
    (number,) = _plan(H)
    if H == 8:
        (attention,) = CALLS["decode_plan_attention"]
        ops.decode_plan_attention(number, *attention()[1:])
    return (number,)


def _plan_with_layer() -> Arguments:
    (number,) = _plan_with_attention()
    (mlp,) = CALLS["decode_plan_mlp"]
    ops.decode_plan_mlp(number, *mlp()[1:])
    return (number,)


def _communicator(world: int) -> Arguments:
    handle = ops.shm_create(0, world, 0, 1.0)
    close_later(ops.all_to_all_close, handle)
    return (handle,)


def _products(tokens: int) -> Arguments:
    """Has decoding take whole products from a number of tokens on."""
    ops.set_products("fp32", tokens, tokens)
    return ()


def _rows(kind: str, E: int, H: int, R: int) -> Arguments:
    return _TENSORS[kind](E * R, H), [R] * E


def _rows_backward(kind: str, E: int, H: int, R: int, F: int) -> Arguments:
    x, rows = _rows(kind, E, H, R)
    return x.clone(), x, _TENSORS[kind](E * R, 2 * F), rows


#: Several arguments by a word.
_SEVERAL: dict[str, Callable[..., Arguments]] = {
    "experts": _expert_stack,
    "router": _router,
    "norm": _norm,
    "heads": _heads,
    "plan": _plan,
    "plan_with_attention": _plan_with_attention,
    "plan_with_layer": _plan_with_layer,
    "ranks": _communicator,
    "products": _products,
    "rows": _rows,
    "rows_backward": _rows_backward,
    "lengths": lambda D: (_i(D) + 8,),
    "device": lambda: (torch.device("cpu"),),
}

_to_close: list[tuple[Callable[[int], None], int]] = []


def close_later(close: Callable[[int], None], number: int) -> None:
    """Has what a call made closed when the calls that use it have ended."""
    _to_close.append((close, number))


def close_all() -> None:
    while _to_close:
        close, number = _to_close.pop()
        close(number)


def _size(text: str, sizes: Sizes) -> Any:
    """Returns a number, a letter's size or a product of them; a letter that is no size stays."""
    if text in _TENSORS and text not in sizes:
        return text
    return math.prod(sizes[part] if part in sizes else int(part) for part in text.split("*"))


def _arguments(description: Any, sizes: Sizes) -> Arguments:
    if isinstance(description, list):
        return ([a for part in description for a in _arguments(part, sizes)],)
    if not isinstance(description, str):
        return (description,)
    kind, *rest = description.split(" ")
    if kind == "t":
        return (" ".join(rest),)
    if kind in _SEVERAL:
        return _SEVERAL[kind](*(_size(word, sizes) for word in rest))
    if kind in _TENSORS:
        return (_TENSORS[kind](*(_size(word, sizes) for word in rest)),)
    return (_size(kind, sizes),)


@dataclass(frozen=True)
class Call:
    """A call's sizes by letter, and what makes its arguments of sizes."""

    sizes: Sizes
    make: Callable[[Sizes], Arguments]

    def __call__(self, **changed: int) -> Arguments:
        return self.make(self.sizes | changed)


def _by_description(sizes: Sizes, descriptions: list[Any]) -> Call:
    return Call(sizes, lambda given: tuple(a for part in descriptions for a in _arguments(part, given)))


def _of(make: Callable[..., Arguments], **sizes: int) -> Call:
    return Call(sizes, lambda given: make(**given))


def _gather_samples(D: int, N: int, S: int, W: int) -> Arguments:
    starts = torch.zeros(N + 1, 2, dtype=torch.int64)
    starts[1:, 1] = torch.arange(1, N + 1) * (W - 1) if W * N < 1 << 20 else 0
    return _i(4096, dtype=torch.uint8), _i(D), _int32(D) + 64, _int32(S), starts, [0] * N, 4, _i(N, W)


#: Well-formed calls, by their op; those of one op differ in their way through it.
CALLS: dict[str, tuple[Call, ...]] = {
    **{op: tuple(_by_description(*row) for row in rows) for op, rows in table(__file__, tuples=False).items()},
    "build_sample_index": (_of(lambda D, S, N: (_int32(D) + 9, _int32(S), 4, _i(N + 1, 2)), D=2, S=3, N=2),),
    "gather_samples": (_of(_gather_samples, D=2, N=1, S=3, W=4),),
}
