"""Operations and memory of code that runs on tensors without storage, as a GPU would have them.

Tensors are on "meta", which is taken for an H100 (`ops.asynchronous`). Collectives of a `StoragelessGroup` return shapes.
For three of a GPU's kernels torch's code for "meta" keeps more, so it is replaced: fused attention keeps its inputs,
its output and a sum for each query; the fused RMSNorm its input and one number a row; the grouped product takes every dtype
and size. Where the host reads a number of rows from the device, it gets that of evenly loaded experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.ops.grouped_products import use_grouped_mm
from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.parallel_state.state import Group, ParallelState, PendingShift
from megatron_samoe.row_exchange.all_to_all import group_of

Kind = Literal["product", "attention", "memory", "collective"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """One operation of one rank.

    Attributes:
        kind: "product" of matrices; "attention", products of queries, keys and values; "memory", whose time is that of its
            bytes; "collective".
        name: torch's name (mm, addmm, grouped_mm, native_layer_norm), or the collective's: all_reduce,
            all_gather, reduce_scatter, all_to_all, shift.
        shape: of a product (groups, M, N, K), where of M or K rows each group has an equal part; of attention (sequences,
            heads, queries, keys, head dim); else of the result.
        dtype: of the first operand.
        flops: multiply-adds x 2. Attention counts the pairs of a query and a key that causality and the window leave.
        read_bytes, written_bytes: of the rank's memory, each operand and result once.
        sent_bytes: what the rank sends: along a ring, or in an all-to-all to the others.
        group: name of the process group of a collective, as in `rank_grid.GROUPS`.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    sent_bytes: float = 0.0
    group: str | None = None

    @classmethod
    def collective(cls, name: str, x: Tensor, result: Tensor, group: Group) -> Operation:
        """Returns the collective that makes `result` of x."""
        before, after = _bytes_of(x), _bytes_of(result)
        sent = (2.0 if name == "all_reduce" else 1.0) * max(before, after) * (group.size - 1) / group.size
        sent = before if name == "shift" else sent
        return cls("collective", name, tuple(result.shape), x.dtype, 0.0, before, after, sent, group.name)


@contextmanager
def recording(rows: int = 0, window: int | None = None) -> Iterator[Recorder]:
    """Records what runs inside on "meta".

    Args:
        rows: that a rank sends to experts, and that its experts have.
        window: most keys that a query attends to; None for all before it.
    """
    recorder = Recorder(window)
    with taken_for_gpu("meta"), _Functions(recorder, rows), recorder:
        yield recorder


def storageless(state: ParallelState) -> ParallelState:
    """Returns the state with groups whose collectives return only shapes."""
    groups: dict[str, Any] = {n: StoragelessGroup(n, state.group(n).ranks, state.group(n).rank) for n in GROUPS}
    return replace(state, **groups)


class StoragelessGroup(Group):
    """A group without other members, for tensors without storage."""

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        return self._exchange("all_reduce", tensor, tensor.shape)

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        return self._exchange("all_gather", tensor, (self.size * len(tensor), *tensor.shape[1:]))

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        return self._exchange("reduce_scatter", tensor, (len(tensor) // self.size, *tensor.shape[1:]))

    def all_to_all(self, tensor: Tensor) -> Tensor:
        return self._exchange("all_to_all", tensor, tensor.shape)

    def all_to_all_uneven(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._exchange("all_to_all", tensor, (sum(receive), *tensor.shape[1:]))

    def start_shift(self, tensor: Tensor) -> PendingShift:
        return PendingShift(self, self._exchange("shift", tensor, tensor.shape), tensor, ())

    def _exchange(self, name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x if self.size == 1 else _collective(x, self, name, shape)


def _collective(x: Tensor, group: Group, name: str, shape: Sequence[int]) -> Tensor:
    """Returns the result of a collective: x itself where it works in place."""
    if has_torch_function((x,)):  # `_Functions` records it
        return handle_torch_function(_collective, (x,), x, group, name, shape)
    return x if name == "all_reduce" else x.new_empty(shape)


class _Functions(TorchFunctionMode):
    """Replaces functions before they become operations of "meta"."""

    def __init__(self, recorder: Recorder, rows: int):
        super().__init__()
        self._recorder, self._rows = recorder, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            # A mask leaves the keys of a causal window: the recorder knows its width.
            is_causal = kwargs.get("is_causal", False) or kwargs.get("attn_mask") is not None
            return aten._scaled_dot_product_flash_attention(*args[:3], kwargs.get("dropout_p", 0.0), is_causal)[0]
        if func is F.rms_norm:
            return torch.native_layer_norm(args[0], args[1], kwargs["weight"], None, kwargs["eps"])[0]
        if func is use_grouped_mm:
            return True
        if func is Tensor.__int__:
            return self._rows
        if func is Tensor.cpu:
            cells = args[0][0].numel()
            even = torch.arange(cells, device="cpu").add(self._rows).div(cells, rounding_mode="floor")
            return even.view(args[0].shape[1:]).expand(args[0].shape)
        result = func(*args, **kwargs)
        if func is _collective:
            self._recorder.operations.append(Operation.collective(args[2], args[0], result, args[1]))
        return result


def _layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, ...]:
    rows = x.shape[: x.dim() - len(shape)]
    mean, factor = (x.new_empty(n, dtype=torch.float32) for n in ((0,) if bias is None else rows, rows))
    return torch.empty_like(x), mean, factor


def _layer_norm_backward(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    *_, weight, bias, mask = others
    return tuple(
        torch.empty_like(t) if m and t is not None else None for t, m in zip((x, weight, bias), mask, strict=True)
    )


def _flash_attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    batch, heads, length, width = query.shape
    y = query.new_empty(batch, length, heads, width).transpose(1, 2)  # in the order of memory that the kernel writes
    sums, seed = query.new_empty(batch, heads, length, dtype=torch.float32), query.new_empty(0)
    return y, sums, None, None, length, key.shape[2], seed, seed, seed


def _flash_attention_backward(dy: Tensor, *saved: Any, **_: Any) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, saved[:3]))


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor, *_: Any) -> Tensor:
    return left.new_empty((len(left), right.shape[2]) if right.dim() == 3 else (len(ends), len(left), right.shape[1]))


#: What kernels of a GPU return, which torch does on "meta" by other operations, or in another order of memory.
_KERNELS: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention: _flash_attention,
    aten._scaled_dot_product_flash_attention_backward: _flash_attention_backward,
    aten._grouped_mm: _grouped_mm,
}
#: Products of two matrices, the last two operands. Batched ones are of attention's scores.
_PRODUCTS: dict[Any, Kind] = {
    aten.mm: "product",
    aten.addmm: "product",
    aten.bmm: "attention",
    aten.baddbmm: "attention",
}
#: Fused attention, and the argument numbers of the query and of whether it is causal.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention: (0, 4),
    aten._scaled_dot_product_flash_attention_backward: (1, 11),
}
_ALLOCATIONS = {aten.empty, aten.empty_strided, aten.new_empty, aten.empty_like, aten.new_empty_strided}
#: Operations that do not read what they change.
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}


class _Effect(NamedTuple):
    """The work of an operation on arguments of some shapes.

    Attributes:
        operation: to record; None for views and bare allocations.
        made: shape, strides and dtype of each new tensor, or another result as it is; None where the operation has to run,
            as it gives views or changes its arguments.
    """

    operation: Operation | None
    made: tuple[Any, ...] | None
    is_one: bool

    def results(self) -> Any:
        assert self.made is not None
        made = tuple(
            torch.empty_strided(f[0], f[1], dtype=f[2], device="meta") if isinstance(f, tuple) else f for f in self.made
        )
        return made[0] if self.is_one else made


#: Most operations are many layers' and layouts', and torch takes long to find their results on "meta".
_EFFECTS: dict[Any, _Effect] = {}


def _facts(values: Iterable[Any]) -> tuple[Any, ...]:
    """Returns what the effect of an operation depends on, of its arguments."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found += value.shape, value.stride(), value.dtype, value.is_meta
        else:
            found += type(value), _facts(value) if isinstance(value, (tuple, list)) else value
    return tuple(found)


class Recorder(TorchDispatchMode):
    """Operations, and the bytes of storages that are made and alive. Temporaries inside torch's own ops are not seen.

    Attributes:
        operations: since the last `take`.
        peak: most bytes since then.
    """

    def __init__(self, window: int | None):
        super().__init__()
        self._window = window
        self.operations: list[Operation] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler at the first operation, for seconds

    def take(self) -> tuple[Operation, ...]:
        """Returns the operations so far, and begins anew."""
        found, self.operations = tuple(self.operations), []
        self.peak = self.alive_bytes()
        return found

    def alive_bytes(self) -> int:
        """Returns the bytes of storages that are alive."""
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self._bytes = sum(size for _, size in self._alive.values())
        return self._bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = func, self._window, _facts(args), _facts(kwargs.items()) if kwargs else ()
        effect = _EFFECTS.get(key)
        if effect is not None and effect.made is not None:
            results = effect.results()
        else:
            results = _KERNELS.get(func.overloadpacket, func)(*args, **(kwargs or {}))
        parts = results if isinstance(results, (tuple, list)) else (results,)
        made = [t for t in parts if isinstance(t, Tensor) and t.is_meta]
        if effect is None:
            operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
            effect = _EFFECTS[key] = self._effect(func, args, operands, parts, made, parts is not results)
        if effect.operation is not None:
            self.operations.append(effect.operation)
        if effect.made is not None:
            for t in made:
                self._note(t)
        return results

    def _note(self, t: Tensor) -> None:
        """Counts a new tensor, whose storage may be another's of the same operation."""
        storage = t.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._bytes += storage.nbytes() - (0 if known is None else known[1])
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._bytes > self.peak:  # or so it seems, with what has gone since
            self.peak = max(self.peak, self.alive_bytes())

    def _effect(
        self, func: Any, args: Any, operands: list[Tensor], parts: Sequence[Any], made: list[Tensor], is_one: bool
    ) -> _Effect:
        packet, known = func.overloadpacket, {t.untyped_storage()._cdata for t in operands}
        is_new = (
            bool(made) and not func._schema.is_mutable and any(t.untyped_storage()._cdata not in known for t in made)
        )
        facts = tuple((t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in parts) if is_new else None
        works = (is_new and packet not in _ALLOCATIONS) or (func._schema.is_mutable and operands)
        return _Effect(self._operation(packet, args, operands, made) if works else None, facts, is_one)

    def _operation(self, packet: Any, args: Any, operands: list[Tensor], made: list[Tensor]) -> Operation:
        name, dtype = packet.__name__.lstrip("_"), (operands or made)[0].dtype
        if name == "all_to_all_rows":
            return Operation.collective("all_to_all", operands[0], made[0], group_of(args[3]))
        kind: Kind = "memory"
        shape, flops = tuple(made[0].shape) if made else (), 0.0
        if packet in _PRODUCTS:
            left, right = (t for t in args[-2:] if isinstance(t, Tensor))
            kind, shape = _PRODUCTS[packet], (*left.shape[:-2], left.shape[-2], right.shape[-1], left.shape[-1])
            shape, flops = shape if left.dim() == 3 else (1, *shape), 2.0 * math.prod(shape)
        elif packet is aten._grouped_mm:
            (left, right, ends), kind = args[:3], "product"
            (rows, inner), groups = left.shape, len(ends)
            # Each group has some of the rows, or, of gradients of weights, some of the products' terms.
            of_rows, of_terms = (groups, 1) if right.dim() == 3 else (1, groups)
            shape, flops = (
                (groups, rows // of_rows, right.shape[-1], inner // of_terms),
                2.0 * rows * inner * right.shape[-1],
            )
        elif packet in _ATTENTION:
            first, bias_index = _ATTENTION[packet]
            query, key, value = args[first : first + 3]
            kind, shape = "attention", (*query.shape[:3], key.shape[2], query.shape[3])
            # The backward pass makes the scores again, and two gradients of each product.
            widths = (3 if first else 1) * query.shape[3] + (2 if first else 1) * value.shape[3]
            pairs = self._pairs(query.shape[2], key.shape[2], len(args) > bias_index and args[bias_index])
            flops = 2.0 * math.prod(query.shape[:2]) * pairs * widths
        read, written = sum(map(_bytes_of, operands[packet in _OVERWRITES :])), sum(map(_bytes_of, made))
        return Operation(kind, name, shape, dtype, flops, read, written)

    def _pairs(self, queries: int, keys: int, is_causal: bool) -> float:
        """Returns the pairs of a query and a key with a score; causally, where the last of both are of one token."""
        if not is_causal:
            return queries * keys
        window, before = self._window or keys, keys - queries
        growing = min(max(window - before, 0), queries)  # queries that see all keys before them
        return growing * before + growing * (growing + 1) / 2 + (queries - growing) * window


def _bytes_of(t: Tensor) -> int:
    """Returns the bytes of a tensor's elements, those of repeated ones once."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
