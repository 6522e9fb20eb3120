"""Counts where a GPU's host would wait, on a machine without one.

Tensors of the CPU stand for a GPU's: `as_if_asynchronous` makes the package choose the algorithms of a device that runs
behind its host, and `HostWaits` counts what would read such a device's numbers. A tensor that was made without a device,
or copied to the host, is the host's, as what is computed from these alone; reading it is no wait.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_samoe.ops.asynchronous import taken_for_gpu

#: Ops whose result's size, or whose result, is a number of the device.
_READERS = set("_local_scalar_dense bincount nonzero masked_select equal is_nonzero".split())
_READERS |= {"_unique2", "unique_dim", "unique_consecutive"}
_METHODS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")
_FACTORIES = ("tensor", "as_tensor", "arange", "zeros", "ones", "empty", "full", "from_numpy")
_HOST = "_lies_on_host"


@contextlib.contextmanager
def as_if_asynchronous(grouped_products: bool = True) -> Iterator[None]:
    """The CPU counts as a device that runs behind the host, without kernels of ours.

    Args:
        grouped_products: whether it is one for which torch has a grouped product (of bf16): an H100, else an A100.
    """
    with taken_for_gpu("cpu", (9, 0) if grouped_products else (8, 0)):
        yield


class HostWaits(TorchDispatchMode):
    """Counts waits by kind, in `counts`, of what runs inside this context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()
        self._is_counting = True

    @property
    def total(self) -> int:
        return self.counts.total()

    def __enter__(self) -> HostWaits:
        for name in _METHODS:
            self._patch(Tensor, name, self._reading)
        self._patch(Tensor, "to", self._moving)
        for name in _FACTORIES:
            self._patch(torch, name, self._making)
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_host = bool(inputs) and all(map(lies_on_host, inputs))
        if not on_host and self._waits(func, args, kwargs):
            self._count(func._schema.name.removeprefix("aten::"))
        results = func(*args, **kwargs)
        if on_host:
            for t in tree_leaves(results):
                _mark(t)
        return results

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        name = func._schema.name.removeprefix("aten::")
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            fills = name != "index" and args[2].numel() == 1  # done as a masked fill
            return bool(masks) and not fills
        return name in _READERS

    def _count(self, kind: str) -> None:
        if self._is_counting:
            self.counts[kind] += 1

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        before, self._is_counting = self._is_counting, False
        try:
            yield
        finally:
            self._is_counting = before

    def _patch(self, owner: Any, name: str, wrap: Callable[[str, Any], Any]) -> None:
        self._patches.enter_context(mock.patch.object(owner, name, wrap(name, getattr(owner, name))))

    def _reading(self, name: str, original: Any) -> Any:
        def read(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not lies_on_host(t):
                self._count(name)
            with self._uncounted():
                result = original(t, *args, **kwargs)
            if name == "cpu":
                result = _mark(result.detach() if result is t else result)
            return result

        return read

    def _moving(self, _name: str, original: Any) -> Any:
        def to(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            named = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.device, str))]
            result = original(t, *args, **kwargs)
            if named and lies_on_host(t):
                if not kwargs.get("non_blocking"):
                    self._count("copy to the device")
                with self._uncounted():
                    result = result.clone()
                result.__dict__.pop(_HOST, None)
            elif named and any(isinstance(a, str) for a in named):  # "cpu" by name
                self._count("copy to the host")
                result = _mark(result.detach())
            return result

        return to

    def _making(self, name: str, original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if kwargs.get("device") is None:
                return _mark(result)
            if name in ("tensor", "as_tensor"):
                self._count("copy to the device")
            return result

        return make


def lies_on_host(t: Tensor) -> bool:
    """Returns whether a tensor is the host's in this game."""
    return getattr(t, _HOST, False)


def _mark(t: Any) -> Any:
    if isinstance(t, Tensor):
        setattr(t, _HOST, True)
    return t
