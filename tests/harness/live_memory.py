"""The memory of tensors, with storage or without: what a device would hold at the peak of a computation, and its largest tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Sums the storages of one type of device that are alive inside this context, in `peak` bytes, and notes how many elements the
    largest holds.

    Temporaries inside torch's own ops are not seen.

    Args:
        held: tensors that exist already.
    """

    def __init__(self, device_type: str = "meta", held: list[Tensor] | None = None):
        super().__init__()
        self._device_type = device_type
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = self.peak = self.largest_elements = 0
        for t in held or []:
            self._note(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, Tensor):
                self._note(t)
        return results

    def _note(self, t: Tensor) -> None:
        if t.device.type != self._device_type:
            return
        storage = t.untyped_storage()
        self.largest_elements = max(self.largest_elements, storage.nbytes() // t.element_size())
        known = self._alive.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        if known is not None:
            self._bytes -= known[1]
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._bytes += storage.nbytes()
        if self._bytes > self.peak:  # or so it seems, with what has gone since
            self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
            self._bytes = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._bytes)
