"""Megatron-LM's per-rank files: where each rank's is, and how one is read without trusting it."""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from megatron_samoe.dist_checkpointing.saved_tensor import is_plain, refuse_packed, refuse_repacked, why_not_loaded
from megatron_samoe.dist_checkpointing.store import LATEST
from megatron_samoe.dist_checkpointing.table_of_contents import Inert
from megatron_samoe.errors import CheckpointError, shown
from megatron_samoe.parsing import read_file

FILE_NAME = "model_optim_rng.pt"
#: The file that a checkpoint of format torch_dist has.
DISTRIBUTED = "metadata.json"
#: The layout of query, key and value that all of Megatron-core's versions write.
CHECKPOINT_VERSION = 3.0

#: numpy 2 has moved it.
np_multiarray = getattr(np, "_core", None) or np.core
np_multiarray = np_multiarray.multiarray
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
#: Classes that Megatron's arguments and states hold in addition to its own, and that nothing here needs.
_INERT = ("types.SimpleNamespace", "signal.Signals", "pathlib.PosixPath", "_io.BytesIO")
#: What a state of numpy's random generator is made of: an array of numbers.
_NUMPY = (
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    (np_multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (np_multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
)


@dataclass(frozen=True)
class RankPlace:
    """A rank of the model-parallel layout."""

    tp: int
    pp: int
    ep: int


def folder_name(rank: RankPlace, pp_size: int, ep_size: int) -> str:
    """Returns the folder of a rank's file: pipeline and expert ranks appear only where there are several."""
    name = f"mp_rank_{rank.tp:02d}"
    if pp_size > 1:
        name += f"_{rank.pp:03d}"
    return name + (f"_{rank.ep:03d}" if ep_size > 1 else "")


def find_iteration(root: Path, ckpt_step: int | None = None) -> Path:
    """Returns the folder of the iteration that Megatron's tracker file names, or `root` if it is one itself.

    Raises:
        CheckpointError: it is missing.
    """
    if is_iteration(root):
        return root
    if ckpt_step is not None:
        name = f"iter_{ckpt_step:07d}"
    else:
        try:
            text = read_file(root / LATEST).decode("utf-8", errors="replace").strip()
        except FileNotFoundError:
            raise CheckpointError(
                f"{root} is not a checkpoint of Megatron's: it has neither {LATEST} nor mp_rank_*."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{root / LATEST} cannot be read: {error.strerror}.") from None
        if text != "release" and not re.fullmatch(r"[0-9]{1,18}", text):
            raise CheckpointError(f"{root / LATEST} is damaged: it holds {text[:40]!r}.")
        name = text if text == "release" else f"iter_{int(text):07d}"
    if not is_iteration(root / name):
        raise CheckpointError(f"{root / name} has no mp_rank_*/{FILE_NAME}, and no {DISTRIBUTED} of format torch_dist.")
    return root / name


def is_iteration(directory: Path) -> bool:
    """Returns whether a folder is one iteration, of either format."""
    return bool(rank_folders(directory)) or (directory / DISTRIBUTED).is_file()


def rank_folders(directory: Path) -> list[Path]:
    """Returns the folders of ranks' files."""
    found = directory.glob("mp_rank_*") if directory.is_dir() else ()
    return sorted(p for p in found if _FOLDER.fullmatch(p.name) and (p / FILE_NAME).is_file())


def place_of(folder: Path, has_pipeline: bool) -> RankPlace:
    """Returns the rank whose folder it is.

    Args:
        has_pipeline: whether the first of two numbers is a pipeline rank or, as the only one, an expert rank.
    """
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    tp, first, second = (int(g) if g is not None else None for g in match.groups())
    if has_pipeline:
        return RankPlace(tp or 0, first or 0, second or 0)
    return RankPlace(tp or 0, 0, first or 0)


def load_rank_file(folder: Path) -> dict[str, Any]:
    """Returns a rank's file with its tensors mapped, not read.

    Raises:
        CheckpointError: it is damaged, of an old format, or names code that is not needed to read it.
    """
    path = folder / FILE_NAME
    content = load_plain(path, path)
    tensors = (
        [value for model in content.values() if isinstance(model, dict) for value in model.values() if is_plain(value)]
        if isinstance(content, dict)
        else []
    )
    try:
        refuse_repacked(path, tensors)
    except (ValueError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
        raise CheckpointError(f"{path} is not a file of Megatron's: it holds no model with its arguments.")
    version = content.get("checkpoint_version", 0)
    if type(version) not in (int, float) or version != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint_version {shown(version)}; this program reads {CHECKPOINT_VERSION}."
        )
    return content


def load_plain(file: Path | io.BytesIO, where: Path) -> Any:
    """Returns what torch.save wrote, with arguments of Megatron's, and with its classes replaced by ones that do nothing.

    Args:
        file: a path, whose tensors are mapped; or its bytes.
        where: the path, for messages.

    Raises:
        CheckpointError: it is damaged, or names code that is not needed to read it.
    """
    with ExitStack() as stack:
        try:
            refuse_packed(file)
            rewind = lambda: file.seek(0) if isinstance(file, io.BytesIO) else None  # noqa: E731
            rewind()
            own = [name for name in get_unsafe_globals_in_checkpoint(file) if name.startswith("megatron.")]
            rewind()
            known: list[Any] = [argparse.Namespace, *_NUMPY, *((Inert, name) for name in (*_INERT, *own))]
            stack.enter_context(torch.serialization.safe_globals(known))
            return torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))
        except Exception as error:  # torch raises many kinds
            raise CheckpointError(f"{where} cannot be read: {why_not_loaded(error, where)}.") from None
