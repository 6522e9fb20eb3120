"""Megatron-LM's per-rank files as one checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_samoe.convert.megatron.names import MegatronLayout
from megatron_samoe.convert.megatron.rank_files import RankPlace, folder_name, load_rank_file, place_of, rank_folders
from megatron_samoe.convert.megatron.stored import Entry, Index, Stored, canonical, count
from megatron_samoe.dist_checkpointing.saved_tensor import is_plain
from megatron_samoe.errors import CheckpointError, is_odd_name, shown, some

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d{1,7})\.")
#: Arguments in which all ranks' files agree.
_SIZES = tuple(f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
_SAME = (*_SIZES, "num_layers", "hidden_size")


def open_rank_files(directory: Path) -> Stored:
    """Returns what the ranks' files of an iteration hold together.

    Raises:
        CheckpointError: a file is missing or damaged, or is of another layout or iteration.
    """
    folders = rank_folders(directory)
    first = load_rank_file(folders[0])
    layout = _layout_of(first["args"], folders[0])
    index = _read_index(folders, first, layout)
    iteration = count(first, "iteration", 0, folders[0], least=0)
    return Stored(directory, folders[0], first["args"], iteration, layout, index, _OpenFiles().read)


class _OpenFiles:
    """Ranks' files, mapped, until so much of them has been read that their pages would fill memory."""

    MAX_BYTES = 128 << 20

    def __init__(self) -> None:
        self._contents: dict[Path, Mapping[str, Any]] = {}
        self._read_bytes = 0

    def read(self, entry: Entry) -> Tensor:
        """Returns a tensor of a rank's file."""
        if self._read_bytes > self.MAX_BYTES:
            self._contents, self._read_bytes = {}, 0
        if entry.folder not in self._contents:
            self._contents[entry.folder] = load_rank_file(entry.folder)
        self._read_bytes += math.prod(entry.shape) * entry.dtype.itemsize
        tensor: Tensor = self._contents[entry.folder][entry.model][entry.key]
        return tensor


def _layout_of(args: Any, where: Path) -> MegatronLayout:
    """Returns the sizes that a file's arguments say."""
    pp, told = count(args, "pipeline_model_parallel_size", 1, where), "The checkpoint's arguments"
    tp = count(args, "tensor_model_parallel_size", 1, told)
    etp = count(args, "expert_tensor_parallel_size", tp, told)
    ep = count(args, "expert_model_parallel_size", 1, told)
    if etp not in (1, tp):
        raise CheckpointError(
            f"expert_tensor_parallel_size is {etp}: only 1 and the tensor-parallel size {tp} are read."
        )
    return MegatronLayout(tp, pp, ep, etp)


def _read_index(folders: list[Path], first: Mapping[str, Any], layout: MegatronLayout) -> Index:
    """Returns what all files hold, with layers numbered over all stages and chunks.

    Args:
        first: the content of one of the files.

    Raises:
        CheckpointError: a rank's file is missing, or is of another layout or iteration.
    """
    tp, pp, ep = layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel
    where, sizes = folders[0].parent, f"its arguments say tensor {tp}, pipeline {pp} and expert parallel {ep}"
    if max(pp, tp, ep) > 64 * len(folders):  # before there is a set of that size
        raise CheckpointError(f"{where} is incomplete: it has {len(folders)} ranks' files; {sizes}.")
    by_rank = {place_of(folder, pp > 1): folder for folder in folders}
    # Where tensor-parallel ranks do not split experts, not every pair of ranks exists.
    missing = sorted(folder_name(rank, pp, ep) for rank in set(layout.ranks()) - set(by_rank))
    if missing:
        raise CheckpointError(f"{where} is incomplete: {some(missing)} missing ({sizes}).")
    known = {RankPlace(t, p, e) for t in range(tp) for p in range(pp) for e in range(ep)}
    known_names = {folder_name(rank, pp, ep) for rank in known}
    strange = sorted(folder.name for folder in folders if folder.name not in known_names)
    if strange:
        raise CheckpointError(f"{where} has files of other ranks than it should: {some(strange)} ({sizes}).")
    index: Index = {}
    contents = {rank: list(_tensors(folder, first)) for rank, folder in by_rank.items()}
    for t, e in sorted({(rank.tp, rank.ep) for rank in by_rank}):
        index[t, e] = {}
        stages = {rank.pp: entries for rank, entries in contents.items() if (rank.tp, rank.ep) == (t, e)}
        for key, entry in _renumbered(stages):
            index[t, e].setdefault(canonical(key), entry)
    return index


def _tensors(folder: Path, first: Mapping[str, Any]) -> Iterator[Entry]:
    content = load_rank_file(folder)
    own, firsts = ({**vars(c["args"]), "iteration": c.get("iteration")} for c in (content, first))
    for name in ("iteration", *_SAME):
        here, there = own.get(name), firsts.get(name)
        if type(here) is not type(there) or isinstance(here, Tensor) or here != there:
            raise CheckpointError(
                f"{folder.parent} is mixed: {name} is {shown(here)} in {folder.name} and {shown(there)} in another."
            )
    models = [name for name in content if re.fullmatch(r"model\d*", name) and isinstance(content[name], dict)]
    if not models:
        raise CheckpointError(f"{folder} holds no model.")
    for model in sorted(models, key=lambda name: int(name[5:] or 0)):
        for key, value in content[model].items():
            if is_odd_name(key):
                raise CheckpointError(f"{folder}: {model} has an entry called {shown(key)}.")
            if isinstance(value, Tensor) and not key.endswith("_extra_state"):
                if not is_plain(value):
                    raise CheckpointError(f"{folder}: {key} is not a dense tensor with its elements in the file.")
                yield Entry(folder, model, key, tuple(value.shape), value.dtype)


def _renumbered(stages: dict[int, list[Entry]]) -> Iterator[tuple[str, Entry]]:
    """Yields entries under names with the layer's number in the full model: chunk by chunk, stage by stage."""
    offset = 0
    for model in sorted({e.model for entries in stages.values() for e in entries}, key=lambda name: int(name[5:] or 0)):
        for stage in sorted(stages):
            entries, count = [e for e in stages[stage] if e.model == model], 0
            for entry in entries:
                match = _LOCAL_LAYER.match(entry.key)
                if match is None:
                    yield entry.key, entry
                    continue
                count = max(count, int(match[1]) + 1)
                yield f"decoder.layers.{int(match[1]) + offset}." + entry.key[match.end() :], entry
            offset += count
