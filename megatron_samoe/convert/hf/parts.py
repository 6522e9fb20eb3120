"""One description for both directions: a foreign tensor is a part of a native one, seen as a view.

Export reads a native tensor once and writes its views; import makes an empty native tensor and fills its views. So no
rule is written twice, and what goes out comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Union

import torch
from torch import Tensor

from megatron_samoe.convert.native import NativeModel

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """A foreign tensor that holds elements of a native one.

    Attributes:
        name: of the foreign tensor.
        native: name of the native one.
        view: maps the native tensor to a view of it with the part's elements in the part's order.
        shape: of the foreign tensor, which may join dims of the view.
        scale: a power of two that the foreign values carry, so that scaling is exact.
        order: index in the view's second dim of each of the foreign tensor's; in order if empty.
        older_shape: that earlier versions wrote, if it was another.
    """

    name: str
    native: str
    view: View
    shape: tuple[int, ...]
    scale: float = 1.0
    order: tuple[int, ...] = ()
    older_shape: tuple[int, ...] = ()

    def elements(self, native: Tensor) -> Tensor:
        """Returns the foreign tensor's elements in order; the shape is the view's, and memory is shared if no scale is."""
        taken = self.view(native)
        taken = taken.index_select(1, torch.tensor(self.order)) if self.order else taken
        return taken if self.scale == 1.0 else taken * self.scale

    def take(self, native: Tensor) -> Tensor:
        """Returns the foreign tensor."""
        return self.elements(native).reshape(self.shape)

    def put(self, native: Tensor, foreign: Tensor) -> None:
        """Writes the foreign tensor's elements into the native one."""
        target = self.view(native)
        foreign = foreign.reshape(target.shape)
        if self.order:
            target.index_copy_(1, torch.tensor(self.order), foreign.to(target.dtype))
        else:
            target.copy_(foreign)
        if self.scale != 1.0:
            target.div_(self.scale)


@dataclass(frozen=True)
class Constant:
    """A foreign tensor that a native model has no counterpart for; every element must be `value`.

    Attributes:
        why: completes "...: our model has ..." where an imported tensor holds something else.
    """

    name: str
    shape: tuple[int, ...]
    value: float
    why: str


Parts = Iterable[Part | Constant]


def whole(t: Tensor) -> Tensor:
    """Returns the tensor itself."""
    return t


@dataclass(frozen=True)
class Row:
    """A line of a family's table: their name | our name | view.

    It holds for every layer where names have {layer}, for every expert where theirs has {expert}, and for a model that has
    our tensor.

    Attributes:
        view: of our tensor, or of one expert's share of it, with a part's sizes.
        joined: shape of their tensor for the view's; one dim for biases, a matrix of what comes last for weights if not given.
        scale, order: see `Part`.
    """

    theirs: str
    ours: str
    view: View = whole
    joined: Callable[[torch.Size], tuple[int, ...]] | None = None
    scale: float = 1.0
    order: tuple[int, ...] = ()

    def part(self, native: NativeModel, **place: int) -> Part:
        """Returns the part at a layer and expert."""
        theirs, ours = self.theirs.format(**place), self.ours.format(**place)
        view = self.view
        if ours in VOCABULARY:
            view = rows(native.vocab_size)
        elif "expert" in place:
            view = _of_expert(place["expert"], view)
        shape = view(torch.empty(native.tensors[ours].shape, device="meta")).shape
        join = self.joined or (vector if len(shape) < 2 or theirs.endswith("bias") else matrix)
        return Part(theirs, ours, view, join(shape), self.scale, self.order)


#: Lines; or a part as it is, or what yields the parts of a layer, where no line says it.
Line = Union[Row, "Part", Callable[[NativeModel, int], "Parts"]]
Rows = Sequence[Line]
#: Tensors of which theirs have no padding.
VOCABULARY = ("embedding.word.weight", "output.weight")


def below(theirs: str, ours: str, *lines: tuple[Any, ...]) -> tuple[Row, ...]:
    """Returns rows of names with one prefix."""
    return tuple(Row(f"{theirs}.{their_end}", f"{ours}.{our_end}", *rest) for their_end, our_end, *rest in lines)


def module(theirs: str, ours: str, *rest: Any) -> tuple[Row, ...]:
    """Returns the lines of a module's weight and of its bias."""
    return below(theirs, ours, ("weight", "weight", *rest), ("bias", "bias", *rest))


def modules(theirs: str, ours: str, *lines: tuple[Any, ...]) -> tuple[Row, ...]:
    """Returns the rows of modules with one prefix."""
    return tuple(row for a, b, *rest in lines for row in module(f"{theirs}.{a}", f"{ours}.{b}", *rest))


def parts_by(table: Rows, native: NativeModel) -> Iterator[Part | Constant]:
    """Yields the parts of a model by a family's table: before the layers, in the layers, and after them."""
    for is_of_layer, lines in groupby(table, _is_of_layer):
        group = list(lines)
        for place in [{"layer": layer} for layer in range(native.model.num_layers)] if is_of_layer else [{}]:
            yield from _parts_at(group, native, place)


def _is_of_layer(line: Line) -> bool:
    return "{layer}" in line.ours if isinstance(line, Row) else not isinstance(line, Part)


def _parts_at(lines: Rows, native: NativeModel, place: Mapping[str, int]) -> Iterator[Part | Constant]:
    """Yields parts such that those of one of our tensors follow each other, expert by expert."""
    for _, same in groupby(lines, lambda line: line.ours if isinstance(line, Row) else id(line)):
        first, *others = same
        if isinstance(first, Part):
            yield first
        elif not isinstance(first, Row):
            yield from first(native, place["layer"])
        elif (stored := native.tensors.get(first.ours.format(**place))) is not None:
            group = [first, *(line for line in others if isinstance(line, Row))]
            by_expert = "{expert}" in first.theirs
            for expert in [{"expert": e} for e in range(stored.shape[0])] if by_expert else [{}]:
                for line in group:
                    yield line.part(native, **place, **expert)


def _of_expert(expert: int, view: View) -> View:
    return lambda t: view(t[expert])


def vector(shape: torch.Size) -> tuple[int, ...]:
    """Returns all dims joined."""
    return (shape.numel(),)


def matrix(shape: torch.Size) -> tuple[int, ...]:
    """Returns all dims but the last joined."""
    return (shape[:-1].numel(), shape[-1])


def by_input(shape: torch.Size) -> tuple[int, ...]:
    """Returns all dims but the first joined."""
    return (shape[0], shape[1:].numel())


def stack(shape: torch.Size) -> tuple[int, ...]:
    """Returns a matrix of each expert."""
    return (shape[0], shape[1:-1].numel(), shape[-1])


def transposed(t: Tensor) -> Tensor:
    """Returns the transpose of a matrix."""
    return t.t()


def rows(count: int) -> View:
    """Returns a view of the first `count` rows: those of a vocabulary before padding."""
    return lambda t: t[:count]


def at(*index: int) -> View:
    """Returns a view at fixed leading indices."""
    return lambda t: t[index]


def queries(t: Tensor) -> Tensor:
    """Returns the queries [G, A/G, D, ...] of a fused projection [G, A/G + 2, D, ...]."""
    return t[:, :-2]


def keys(t: Tensor) -> Tensor:
    """Returns the keys [G, D, ...] of a fused projection."""
    return t[:, -2]


def values(t: Tensor) -> Tensor:
    """Returns the values [G, D, ...] of a fused projection."""
    return t[:, -1]


def in_pairs(before: int, rotated: int) -> tuple[int, ...]:
    """Returns our index of each of their channels, of which the last `rotated` are pairs: ours are half of them apart."""
    half = rotated // 2
    return (*range(before), *(before + j + part * half for j in range(half) for part in (0, 1)))


def join(parts: Iterable[Part], shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[str], Tensor]) -> Tensor:
    """Returns the native tensor that foreign ones make up; elements of no part (padding) are zero."""
    parts = list(parts)
    covered = sum(torch.Size(part.shape).numel() for part in parts) == torch.Size(shape).numel()
    native = (torch.empty if covered else torch.zeros)(shape, dtype=dtype)
    for part in parts:
        part.put(native, read(part.name))
    return native


def parts_of(parts: Parts) -> Mapping[str, list[Part]]:
    """Returns the parts of each native tensor."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        if isinstance(part, Part):
            found.setdefault(part.native, []).append(part)
    return found
