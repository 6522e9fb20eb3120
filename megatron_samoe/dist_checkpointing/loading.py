"""The loading of a rank's parts of tensors from a checkpoint that any layout has saved, which verifies it in the same pass.

One rank reads all of a file, once: its own parts go straight into their tensors, and are digested from there. Other ranks
read only their parts of that file.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import operator
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing.digests import BLOCK_BYTES, Target, advise, digest_of, is_damage, read_up_to
from megatron_samoe.dist_checkpointing.saved_tensor import (
    SavedBytes,
    find_saved_bytes,
    read_saved_tensor,
    saved_tensor_in,
)
from megatron_samoe.dist_checkpointing.sharded_state import ShardedState, ShardedTensor
from megatron_samoe.dist_checkpointing.store import (
    TRAIN_STATE,
    Problems,
    damaged_files,
    is_tensor_file,
    read_train_state,
)
from megatron_samoe.dist_checkpointing.table_of_contents import (
    METADATA,
    PartedTensor,
    StoredPart,
    TableOfContents,
    read_table,
)
from megatron_samoe.errors import CheckpointError, some
from megatron_samoe.parallel_state.state import ParallelState

#: Files that a rank reads at a time. Each has a thread that reads and one that digests.
FILES_AT_A_TIME = 2
#: Parts up to this size are read with all that torch.save adds to them.
SMALL_BYTES = 1 << 20

Loaded = TypeVar("Loaded")


class DamagedFilesError(CheckpointError):
    """Files of a checkpoint differ from what was written. Tensors that were being loaded may have parts of them.

    Attributes:
        problems: a line for each file, the same on all ranks.
    """

    def __init__(self, directory: Path, problems: Sequence[str]):
        super().__init__(f"{directory} is damaged: {'; '.join(problems[:3])}.", collective=True)
        self.directory, self.problems = directory, list(problems)


def load_newest(load: Callable[[Problems], Loaded], parallel: ParallelState) -> Loaded:
    """Returns what `load` returns, from the newest checkpoint that is not damaged; all ranks call it together.

    Args:
        load: finds a checkpoint and loads it. Its argument says what is wrong with a checkpoint, for `find_checkpoint`:
            before loading, of all files but those of tensors. Damage to these is found by loading: `load` is called again.
    """
    found: dict[Path, list[str]] = {}
    while True:
        try:
            return load(
                lambda directory: found.get(directory) or damaged_files(directory, parallel, with_tensors=False)
            )
        except DamagedFilesError as error:
            if error.directory in found:
                raise
            found[error.directory] = error.problems


def load_checkpoint(directory: Path, state: ShardedState, parallel: ParallelState) -> None:
    """Fills a state's tensors from a checkpoint folder, all of whose files of tensors are compared with their digests; all
    ranks call it together. After an error, the tensors are neither as they were nor as the checkpoint has them.

    Raises:
        DamagedFilesError: a file is missing, unreadable, or differs from what was written.
        CheckpointError: a tensor is missing or has another shape.
    """
    plan, problem = _Plan({}, {}, {}), None
    try:
        plan = _plan(directory, state)
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # a damaged file may raise anything
        problem = f"The checkpoint in {directory} cannot be read: {str(error) or type(error).__name__}."
    ranks = parallel.world.all_gather_object((problem, plan.num_wanted()))
    _refuse([found for found, _ in ranks if found is not None])
    names = sorted({name for name in plan.digests if is_tensor_file(name)}.union(*(counts for _, counts in ranks)))
    if unknown := [name for name in names if name not in plan.digests]:
        raise DamagedFilesError(directory, [f"{name} has no digest in {TRAIN_STATE}" for name in unknown])
    digesting = _digesting_ranks(names, plan.sizes, [counts for _, counts in ranks])
    readings = []
    for name in names:
        digest = plan.digests[name] if digesting[name] == parallel.rank else None
        if digest is not None or name in plan.wanted:
            readings.append(_FileReading(directory / name, plan.wanted.get(name, []), digest))
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
        damage = [line for line in threads.map(_FileReading.run, readings) if line]
    ends = parallel.world.all_gather_object((damage, [line for reading in readings for line in reading.unread]))
    if lines := {line for found, _ in ends for line in found}:
        raise DamagedFilesError(directory, sorted(lines))
    _refuse([line for _, found in ends for line in found])


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError(problems[0], collective=True)


def check_tensors(state: ShardedState, table: TableOfContents) -> None:
    """Raises CheckpointError naming tensors that the checkpoint lacks or has in another shape."""
    missing = [name for name in state if name not in table.tensors]
    if missing:
        raise CheckpointError(
            f"The checkpoint has no tensor {some(missing)}: it is of a model with other layers, experts or options "
            "(compare its config.yaml)."
        )
    shaped = [
        f"{name} is {list(table.tensors[name].shape)} in the checkpoint and {list(t.global_shape)} in the model"
        for name, parts in state.items()
        for t in parts[:1]
        if table.tensors[name].shape != t.global_shape
    ]
    if shaped:
        raise CheckpointError(f"The checkpoint does not fit the model: {some(shaped)}.")


def _digesting_ranks(
    names: Sequence[str], sizes: Mapping[str, int], wanted_by_rank: Sequence[Mapping[str, int]]
) -> dict[str, int]:
    """Returns which rank digests each file: among those that want most of it, the one with the least to digest so far."""
    work, chosen = [0] * len(wanted_by_rank), {}
    for name in names:
        wanted = [counts.get(name, 0) for counts in wanted_by_rank]
        most = [rank for rank, count in enumerate(wanted) if 2 * count >= max(wanted)]
        chosen[name] = min(most, key=work.__getitem__)
        work[chosen[name]] += sizes[name]
    return chosen


@dataclass(frozen=True)
class _WantedPart:
    """A stored part of a tensor that overlaps parts of this rank.

    Attributes:
        copies: each overlap, as a view of this rank's tensor and as slices of the stored part.
    """

    name: str
    parted: PartedTensor
    stored: StoredPart
    copies: Sequence[tuple[Tensor, tuple[slice, ...]]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the overlaps, as they are stored."""
        return sum(target.numel() for target, _ in self.copies) * self.parted.dtype.itemsize

    def runs(self) -> list[tuple[int, Tensor]]:
        """Returns each overlap with the number of its first element, in order, if all are runs of the stored elements; else
        nothing."""
        runs, end = [], 0
        steps = torch.empty(self.stored.sizes, device="meta").stride()
        for target, box in self.copies:
            first = sum(axis.start * step for axis, step in zip(box, steps, strict=True))
            last = sum((axis.stop - 1) * step for axis, step in zip(box, steps, strict=True))
            if not target.is_contiguous() or last - first + 1 != target.numel():
                return []
            runs.append((first, target))
        runs.sort(key=lambda run: run[0])
        for first, target in runs:
            if first < end:
                return []
            end = first + target.numel()
        return runs

    def take(self, saved: Tensor) -> None:
        """Copies the overlaps from the stored part."""
        for target, box in self.copies:
            target.copy_(saved[box])


@dataclass(frozen=True)
class _Plan:
    """A rank's knowledge of a checkpoint before it reads tensors.

    Attributes:
        wanted: by file the stored parts that overlap this rank's, in the order of the file.
        sizes: bytes of all parts in a file.
        digests: of all files.
    """

    wanted: Mapping[str, Sequence[_WantedPart]]
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    def num_wanted(self) -> dict[str, int]:
        """Returns the bytes that this rank wants of each file."""
        return {name: sum(part.num_bytes for part in parts) for name, parts in self.wanted.items()}


def _plan(directory: Path, state: ShardedState) -> _Plan:
    table, digests = read_table(directory), read_train_state(directory)["digests"]
    written = digests.get(METADATA, "")
    if digest_of(directory / METADATA, written) != written:
        raise CheckpointError(f"{directory} is damaged: {METADATA} differs from what was written.")
    check_tensors(state, table)
    sizes = Counter[str]()
    for stored in (part for parted in table.tensors.values() for part in parted.parts):
        sizes[stored.file] += stored.length
    wanted: dict[str, list[_WantedPart]] = defaultdict(list)
    for name, parts in state.items():
        for stored in table.tensors[name].parts:
            if copies := [overlap for part in parts if (overlap := _overlap(part, stored)) is not None]:
                wanted[stored.file].append(_WantedPart(name, table.tensors[name], stored, copies))
    for found in wanted.values():
        found.sort(key=lambda part: part.stored.start)
    return _Plan(dict(wanted), sizes, digests)


def _overlap(part: ShardedTensor, stored: StoredPart) -> tuple[Tensor, tuple[slice, ...]] | None:
    """Returns the view of a rank's part that a stored part overlaps, and the slices of the stored part; None without any."""
    starts = tuple(map(max, part.offsets, stored.offsets))
    ends = tuple(map(min, _ends(part), _ends(stored)))
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return None
    return part.local.detach()[_box(starts, ends, part.offsets)], _box(starts, ends, stored.offsets)


def _ends(part: ShardedTensor | StoredPart) -> tuple[int, ...]:
    return tuple(map(operator.add, part.offsets, part.sizes))


def _box(starts: Sequence[int], ends: Sequence[int], base: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - b, end - b) for start, end, b in zip(starts, ends, base, strict=True))


class _FileReading:
    """The reading of a file, for this rank's parts, for its digest, or for both.

    Args:
        parts: in the order of the file.
        digest: that the file must have; None where another rank compares it.

    Attributes:
        unread: a sentence for each part that could not be read.
    """

    def __init__(self, path: Path, parts: Sequence[_WantedPart], digest: str | None):
        self.path, self.parts, self.digest = path, parts, digest
        self.unread: list[str] = []
        #: Parts whose elements the file does not have in their order, which are read again.
        self._others: list[_WantedPart] = []

    def run(self) -> str:
        """Reads the file, and returns what is wrong with all of it, empty where nothing is."""
        try:
            if not self.path.is_file():
                return f"{self.path.name} is missing"
            if self.digest is None:
                self._read_parts()
            elif digest_of(self.path, self.digest, self._targets) != self.digest:
                return f"{self.path.name} differs from what was written"
        except OSError as error:
            if is_damage(error):
                return f"{self.path.name} cannot be read: {error.strerror or error}"
            self.unread.append(f"{self.path} cannot be read: {error.strerror or error}.")
        except Exception as error:  # on one rank only, it must still reach the others
            self.unread.append(f"{self.path} cannot be read: {str(error) or type(error).__name__}.")
        for part in self._others:
            with self._noting(part):
                part.take(read_part(self.path.parent, part.name, part.parted, part.stored))
        return ""

    def _read_parts(self) -> None:
        with open(self.path, "rb", buffering=0) as file:
            for target in self._targets(file):
                if read_up_to(target.memory, file.fileno(), target.offset).nbytes < target.memory.nbytes:
                    raise OSError(0, "it became shorter while it was read")
                target.filled()

    def _targets(self, file: io.FileIO) -> Iterator[Target]:
        """Yields where bytes of the file go, in its order."""
        end, size = 0, os.fstat(file.fileno()).st_size
        for part in self.parts:
            if part.stored.length > SMALL_BYTES:
                # Its table of contents is its last page: asked for by itself, it would wait behind all that is read ahead.
                tail = part.stored.start + part.stored.length - mmap.PAGESIZE
                advise(file.fileno(), "WILLNEED", tail, mmap.PAGESIZE)
        for part in self.parts:
            with self._noting(part):
                if part.stored.start + part.stored.length > size:
                    raise EOFError("the file ends within it")
                if part.stored.start < end:
                    raise ValueError("it begins within another part")
                for target in self._targets_of(file, part):
                    yield target
                    end = target.offset + target.memory.nbytes

    def _targets_of(self, file: io.FileIO, part: _WantedPart) -> Iterator[Target]:
        """Yields the memory that a part goes to; none for one that is to be read later."""
        stored = part.stored
        if stored.length <= SMALL_BYTES:
            content = bytearray(stored.length)
            yield Target(stored.start, memoryview(content), partial(self._take_small, part, content))
            return
        saved = find_saved_bytes(file, stored.start, stored.length)
        if saved is None:
            self._others.append(part)
            return
        _refuse_other(self.path, part.name, saved, part.parted, stored)
        if runs := part.runs():
            for first, run in runs:
                yield from self._targets_of_run(part, saved.offset + first * saved.dtype.itemsize, run.view(-1))
        else:
            memory = torch.empty(stored.sizes, dtype=saved.dtype)
            yield Target(saved.offset, _bytes_of(memory), partial(self._take, part, memory))

    def _targets_of_run(self, part: _WantedPart, offset: int, run: Tensor) -> Iterator[Target]:
        """Yields a run's own memory, or where it is of another dtype or device, blocks from which it is copied."""
        dtype = part.parted.dtype
        if run.dtype == dtype and run.device.type == "cpu":
            yield Target(offset, _bytes_of(run))
            return
        for piece in run.split(BLOCK_BYTES // dtype.itemsize):
            block = torch.empty(piece.shape, dtype=dtype)
            yield Target(offset, _bytes_of(block), partial(piece.copy_, block))
            offset += block.nbytes

    def _take(self, part: _WantedPart, saved: Tensor) -> None:
        with self._noting(part):
            part.take(saved)

    def _take_small(self, part: _WantedPart, content: bytearray) -> None:
        with self._noting(part):
            saved = saved_tensor_in(io.BytesIO(content))
            _refuse_other(self.path, part.name, saved, part.parted, part.stored)
            part.take(saved)

    @contextlib.contextmanager
    def _noting(self, part: _WantedPart) -> Iterator[None]:
        """Keeps an error as a sentence: the complete file is still to be compared with its digest."""
        try:
            yield
        except CheckpointError as error:
            self.unread.append(str(error))
        except Exception as error:  # torch raises several kinds for damaged files
            self.unread.append(_cannot_read(self.path, part.name, error))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_part(directory: Path, name: str, parted: PartedTensor, part: StoredPart) -> Tensor:
    """Returns a stored part of a tensor; see `read_saved_tensor`.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = directory / part.file
    try:
        tensor = read_saved_tensor(path, part.start, part.length)
    except Exception as error:  # torch raises several kinds for damaged files
        raise CheckpointError(_cannot_read(path, name, error)) from None
    _refuse_other(path, name, tensor, parted, part)
    return tensor


def _cannot_read(path: Path, name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} is damaged: {name} cannot be read ({reason})."


def _refuse_other(path: Path, name: str, saved: Tensor | SavedBytes, parted: PartedTensor, part: StoredPart) -> None:
    """Raises CheckpointError where a saved part has another shape or dtype than the table of contents says."""
    if saved.shape != part.sizes or saved.dtype != parted.dtype:
        raise CheckpointError(
            f"{path} is damaged: {name} is {list(saved.shape)} {saved.dtype} in place of {list(part.sizes)} {parted.dtype}."
        )
