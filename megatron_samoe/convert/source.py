"""What is to be converted: which family a folder is of, and its tensors under our names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.edited_model import EditedModel, open_checkpoint
from megatron_samoe.convert.hf.export import native_model, refuse_other_tensors
from megatron_samoe.convert.hf.folder import ADAPTER, CONFIG, is_hf_folder
from megatron_samoe.convert.hf.source import HFSource
from megatron_samoe.convert.megatron.rank_files import rank_folders
from megatron_samoe.convert.megatron.reader import MegatronReader
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, GlobalTensors
from megatron_samoe.errors import CheckpointError, ConfigError, in_units, readable

Kind = Literal["native", "megatron", "hf"]
#: What a model can become: GGUF is written only.
TargetKind = Literal["native", "megatron", "hf", "gguf"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {
    "native": "a checkpoint of this program",
    "megatron": "a checkpoint of Megatron-LM (format torch)",
    "hf": "a Hugging Face folder",
}


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        directory: where its files are, which may lie below the folder that was given.
        notes: lines that a user should know.
    """

    kind: Kind
    directory: Path
    tensors: GlobalTensors
    notes: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """The source in a line."""
        return f"{_NAMES[self.kind]} in {self.directory}"


def kind_of(directory: Path) -> Kind:
    """Returns the family of a folder.

    Raises:
        CheckpointError: it is of none that is known.
    """
    if is_hf_folder(directory):
        return "hf"
    if (directory / store.TRAIN_STATE).is_file() or store.whole_iterations(directory):
        return "native"
    # Megatron's reader says what is wrong with a folder that only its tracker file makes look like one.
    if rank_folders(directory) or (directory / store.LATEST).is_file():
        return "megatron"
    known = f"{'; '.join(_NAMES.values())} ({CONFIG} and weights)"
    if not directory.is_dir():
        raise CheckpointError(
            f"--load-dir {directory} is {'a file' if directory.exists() else 'not there'}; it must be {known}."
        )
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            f"--load-dir {directory} holds an adapter of peft and no model: merge it into the model that it was trained for "
            "(merge_and_unload, then save_pretrained), and give the folder of that."
        )
    names = sorted(readable(path.name) for path in directory.iterdir())
    held = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}" if names else "nothing"
    inner = directory / "checkpoints"  # of a run's folder
    hint = f" Give {inner}." if store.whole_iterations(inner) else ""
    raise CheckpointError(f"--load-dir {directory} holds {held}; it must be {known}.{hint}")


def open_source(directory: Path, wanted: str, ckpt_step: int | None = None, vocab_size: int | None = None) -> Source:
    """Returns a folder's model.

    Args:
        wanted: its family, or auto.
        ckpt_step: iteration, where there may be several; the newest if not given.
        vocab_size: tokens that exist, where Megatron's files do not tell.

    Raises:
        CheckpointError: the folder is of another family, damaged, incomplete, or of a newer format.
        ConfigError: an option has no effect on this family.
    """
    directory = Path(store.checkpoints_of(str(directory)))
    found = kind_of(directory)
    if wanted not in ("auto", found):
        raise CheckpointError(f"--load-dir {directory} is {_NAMES[found]}, and --from says {wanted}.")
    if vocab_size is not None and found != "megatron":
        raise ConfigError("--vocab-size", vocab_size, f"is for Megatron's checkpoints; {_NAMES[found]} tells its own")
    if found == "native":
        reader = open_checkpoint(directory, ckpt_step)
        refuse_other_tensors(reader)
        return Source(found, reader.directory, reader, _without_optimizer(reader))
    if found == "megatron":
        megatron = MegatronReader(directory, ckpt_step, vocab_size)
        return Source(found, megatron.directory, megatron, tuple(megatron.notes))
    if ckpt_step is not None:
        raise ConfigError("--ckpt-step", ckpt_step, "a Hugging Face folder holds one model only")
    folder = HFSource(directory)
    return Source(found, directory, folder, (f"Its class is {folder.family.architecture}.", *folder.notes))


def _without_optimizer(reader: CheckpointReader) -> tuple[str, ...]:
    size = sum(t.num_bytes for name, t in reader.tensors.items() if name.startswith("optimizer."))
    return (f"Its optimizer state ({in_units(size, 'B')}) is left out.",) if size else ()


def recast(source: GlobalTensors, dtype: torch.dtype) -> EditedModel:
    """Returns a model in another precision; what a run keeps in fp32 whatever its precision stays so."""
    native = native_model(source)
    training = replace(native.config.training, bf16=dtype == torch.bfloat16, fp16=False)
    changed = replace(native, config=replace(native.config, training=training))
    edited = EditedModel(to_mapping(changed.config), source.train_state, attachments=source.attachments)
    for name, stored in source.tensors.items():
        if not name.startswith("optimizer."):
            edited.keep(source, name, dtype=changed.tensors.get(name, stored).dtype)
    return edited
