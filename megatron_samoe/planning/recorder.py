"""Operations and memory of code that runs on tensors without storage, as a GPU would have them.

Tensors are on "meta", which is taken for an H100 (`ops.asynchronous`). Collectives of a `StoragelessGroup` return shapes.
What torch runs on "meta" in place of three of a GPU's kernels keeps more, so it is replaced: fused attention keeps its inputs,
its output and a sum for each query; the fused RMSNorm its input and one number a row; the grouped product takes every dtype
and size. Where the host reads a number of rows from the device, it gets that of evenly loaded experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

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


class Recorder:
    """The operations since the last `take`, and the bytes of storages that were made and are alive; see `recording`.

    Temporaries inside torch's own ops are not seen.

    Attributes:
        peak: most bytes since the last `take`.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = self.peak = 0

    def take(self) -> tuple[Operation, ...]:
        """Returns the operations so far, and begins anew."""
        found, self._operations = tuple(self._operations), []
        self.peak = self.alive_bytes()
        return found

    def alive_bytes(self) -> int:
        """Returns the bytes of storages that are alive."""
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self._bytes = sum(size for _, size in self._alive.values())
        return self._bytes

    def operation(self, operation: Operation) -> None:
        """Adds an operation."""
        self._operations.append(operation)

    def made(self, t: Tensor) -> None:
        """Takes note of a tensor, whose storage may be known."""
        storage = t.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        if known is not None:
            self._bytes -= known[1]
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._bytes += storage.nbytes()
        if self._bytes > self.peak:  # or so it seems, with what has gone since
            self.peak = max(self.peak, self.alive_bytes())


@contextmanager
def recording(rows: int = 0, window: int | None = None) -> Iterator[Recorder]:
    """Records what runs inside on "meta".

    Args:
        rows: that a rank sends to experts, and that its experts have.
        window: most keys that a query attends to; None for all before it.
    """
    recorder = Recorder()
    with taken_for_gpu("meta"), _Functions(recorder, rows), _Kernels(recorder, window):
        yield recorder


def storageless(state: ParallelState) -> ParallelState:
    """Returns the state with groups whose collectives return shapes alone."""
    groups: dict[str, Any] = {}
    for name in GROUPS:
        group = state.group(name)
        groups[name] = StoragelessGroup(name, group.ranks, group.rank)
    return replace(state, **groups)


class StoragelessGroup(Group):
    """A group without other members, for tensors without storage."""

    def all_reduce(self, tensor: Tensor, op: Any = None) -> Tensor:
        return tensor if self.size == 1 else _collective(tensor, self, "all_reduce", tensor.shape)

    def all_gather(self, tensor: Tensor) -> Tensor:
        shape = (self.size * tensor.shape[0], *tensor.shape[1:])
        return tensor if self.size == 1 else _collective(tensor, self, "all_gather", shape)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        shape = (tensor.shape[0] // self.size, *tensor.shape[1:])
        return tensor if self.size == 1 else _collective(tensor, self, "reduce_scatter", shape)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else _collective(tensor, self, "all_to_all", tensor.shape)

    def all_to_all_uneven(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        shape = (sum(receive), *tensor.shape[1:])
        return tensor if self.size == 1 else _collective(tensor, self, "all_to_all", shape)

    def start_shift(self, tensor: Tensor) -> PendingShift:
        received = tensor if self.size == 1 else _collective(tensor, self, "shift", tensor.shape)
        return PendingShift(self, received, tensor, ())


def _collective(x: Tensor, group: Group, name: str, shape: Sequence[int]) -> Tensor:
    """Returns what a collective does: x itself where it works in place."""
    if has_torch_function((x,)):  # `_Functions` records it
        return handle_torch_function(_collective, (x,), x, group, name, shape)
    return x if name == "all_reduce" else x.new_empty(shape)


def _sent(name: str, operand: int, result: int, size: int) -> float:
    """Returns the bytes that a rank sends in a collective of a group."""
    if name == "shift":
        return operand
    return (2 if name == "all_reduce" else 1) * max(operand, result) * (size - 1) / size


class _Functions(TorchFunctionMode):
    """Replaces functions of torch before they become operations."""

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
            (x, shape), weight, epsilon = args, kwargs["weight"], kwargs["eps"]
            return torch.native_layer_norm(x, shape, weight, None, epsilon)[0]
        if func is use_grouped_mm:
            return True
        if func is _collective:
            x, group, name, _ = args
            result = func(*args)
            before, after = _bytes_of(x), _bytes_of(result)
            sent = _sent(name, before, after, group.size)
            self._recorder.operation(
                Operation("collective", name, tuple(result.shape), x.dtype, 0.0, before, after, sent, group.name)
            )
            return result
        if func is Tensor.__int__:
            return self._rows
        if func is Tensor.cpu:
            (table,) = args
            cells = table[0].numel()
            even = torch.arange(cells, device="cpu").add(self._rows).div(cells, rounding_mode="floor")
            return even.view(table.shape[1:]).expand(table.shape)
        return func(*args, **kwargs)


aten = torch.ops.aten


def _layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, ...]:
    rows = x.shape[: x.dim() - len(shape)]
    mean, factor = (x.new_empty(n, dtype=torch.float32) for n in ((0,) if bias is None else rows, rows))
    return torch.empty_like(x), mean, factor


def _layer_norm_backward(
    dy: Tensor, x: Tensor, shape: Any, mean: Tensor, factor: Tensor, weight: Tensor, bias: Tensor | None, mask: Any
) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.empty_like(t) if t is not None and m else None for t, m in zip((x, weight, bias), mask, strict=True)
    )


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    batch, heads, length, width = query.shape
    y = query.new_empty(batch, length, heads, width).transpose(1, 2)  # in the order of memory that the kernel writes
    sums, seed = query.new_empty(batch, heads, length, dtype=torch.float32), query.new_empty(0)
    return y, sums, None, None, length, key.shape[2], seed, seed, seed


def _flash_attention_backward(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor, *_: Any, **__: Any) -> Tensor:
    shape = (len(left), right.shape[2]) if right.dim() == 3 else (len(ends), len(left), right.shape[1])
    return left.new_empty(shape)


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
#: Fused attention, and the place of the query and of whether it is causal among the arguments.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention: (0, 4),
    aten._scaled_dot_product_flash_attention_backward: (1, 11),
}
_ALLOCATIONS = {aten.empty, aten.empty_strided, aten.new_empty, aten.empty_like, aten.new_empty_strided}
#: Operations that do not read what they change.
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}


@dataclass(frozen=True)
class _Made:
    """New tensors: shape, strides and dtype of each; other results as they are."""

    facts: tuple[Any, ...]
    is_one: bool

    @staticmethod
    def of(results: Any) -> _Made:
        facts = tuple((t.shape, t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in _parts(results))
        return _Made(facts, isinstance(results, Tensor))

    def __call__(self) -> Any:
        made = tuple(
            torch.empty_strided(f[0], f[1], dtype=f[2], device="meta") if isinstance(f, tuple) else f
            for f in self.facts
        )
        return made[0] if self.is_one else made


@dataclass(frozen=True)
class _Effect:
    """What an operation does for arguments of some shapes.

    Attributes:
        operation: to record; None for views and bare allocations.
        made: new results; None where it has to run, as it gives views or changes its arguments.
    """

    operation: Operation | None
    made: _Made | None


#: Most operations are many layers' and layouts', and torch takes long to find their results on "meta".
_EFFECTS: dict[Any, _Effect] = {}


def _facts(values: Iterable[Any]) -> tuple[Any, ...]:
    """Returns what the effect of an operation depends on, of its arguments."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found += value.shape, value.stride(), value.dtype, value.is_meta
        elif isinstance(value, (tuple, list)):
            found.append(_facts(value))
        else:
            found += type(value), value
    return tuple(found)


def _parts(results: Any) -> Sequence[Any]:
    return results if isinstance(results, (tuple, list)) else (results,)


class _Kernels(TorchDispatchMode):
    """Records operations with what they make."""

    def __init__(self, recorder: Recorder, window: int | None):
        super().__init__()
        self._recorder, self._window = recorder, window

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler at the first operation, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = func, self._window, _facts(args), _facts(kwargs.items()) if kwargs else ()
        effect = _EFFECTS.get(key)
        if effect is not None and effect.made is not None:
            results = effect.made()
        else:
            results = _KERNELS.get(func.overloadpacket, func)(*args, **(kwargs or {}))
        made = [t for t in _parts(results) if isinstance(t, Tensor) and t.is_meta]
        if effect is None:
            effect = _EFFECTS[key] = self._effect(func, args, kwargs, results, made)
        if effect.operation is not None:
            self._recorder.operation(effect.operation)
        if effect.made is not None:
            for t in made:
                self._recorder.made(t)
        return results

    def _effect(self, func: Any, args: Any, kwargs: Any, results: Any, made: list[Tensor]) -> _Effect:
        packet, operands = (
            func.overloadpacket,
            [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta],
        )
        known = {t.untyped_storage()._cdata for t in operands}
        changes, is_view = (
            func._schema.is_mutable,
            bool(made) and all(t.untyped_storage()._cdata in known for t in made),
        )
        again = None if changes or is_view or not made else _Made.of(results)
        no_work = not (operands or made) or (is_view and not changes) or packet in _ALLOCATIONS
        return _Effect(None if no_work else self._operation(packet, args, operands, made), again)

    def _operation(self, packet: Any, args: Any, operands: list[Tensor], made: list[Tensor]) -> Operation:
        name, shape = packet.__name__.lstrip("_"), tuple(made[0].shape) if made else ()
        kind: Kind = "memory"
        flops, sent, group = 0.0, 0.0, None
        read, written = sum(map(_bytes_of, operands[packet in _OVERWRITES :])), sum(map(_bytes_of, made))
        if packet in _PRODUCTS:
            left, right = (t for t in args[-2:] if isinstance(t, Tensor))
            batch = left.shape[0] if left.dim() == 3 else 1
            kind, shape = _PRODUCTS[packet], (batch, left.shape[-2], right.shape[-1], left.shape[-1])
            flops = 2.0 * math.prod(shape)
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
            first, place = _ATTENTION[packet]
            query, key, value = args[first : first + 3]
            kind, shape = "attention", (*query.shape[:3], key.shape[2], query.shape[3])
            products = 2 * query.shape[3] + value.shape[3] if first else 0  # the backward pass makes the scores again
            products += query.shape[3] + value.shape[3]
            is_causal = args[place] if len(args) > place else False  # its default
            flops = 2.0 * math.prod(query.shape[:2]) * self._pairs(query.shape[2], key.shape[2], is_causal) * products
        elif name == "all_to_all_rows":
            of = group_of(args[3])
            name, kind, group = "all_to_all", "collective", of.name
            sent = _sent(name, read, written, of.size)
        dtype = operands[0].dtype if operands else made[0].dtype
        return Operation(kind, name, shape, dtype, flops, read, written, sent, group)

    def _pairs(self, queries: int, keys: int, is_causal: bool) -> float:
        """Returns the pairs of a query and a key that meet; causally, where the last of both are of one token."""
        if not is_causal:
            return queries * keys
        window, before = self._window or keys, keys - queries
        growing = min(max(window - before, 0), queries)  # queries that see all keys before them
        return growing * before + growing * (growing + 1) / 2 + (queries - growing) * window


def _bytes_of(t: Tensor) -> int:
    """Returns the bytes of a tensor's elements, those of repeated ones once."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
