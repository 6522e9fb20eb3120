"""One description for both directions: a foreign tensor is a part of a native one, seen as a view.

Export reads a native tensor once and writes its views; import makes an empty native tensor and fills its views. So no
rule stands twice, and what goes out comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
        order: place in the view's second dim of each of the foreign tensor's; in order if empty.
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
        """Writes the foreign tensor's elements to their places in the native one."""
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
