"""The output of a conversion, by family of the target: planned, shown, then written."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.edited_model import EditedModel, source_config
from megatron_samoe.convert.gguf import export as gguf_export
from megatron_samoe.convert.hf.export import native_model, plan_export, write_export
from megatron_samoe.convert.hf.tokenizer_files import TOKENIZER, imported_tokenizer, tokenizer_files
from megatron_samoe.convert.megatron.dist_export import iteration_name, plan_dist_export, write_dist_export
from megatron_samoe.convert.output_folder import require_new, require_space
from megatron_samoe.convert.read_ahead import Progress, ReadAhead
from megatron_samoe.datasets.carried_tokenizer import chat_of, read_files
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor, write_checkpoint
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.errors import CheckpointError, in_units

#: Precisions by their names for users.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: A number of a layer or expert in a tensor's name; w1 and w2 are names.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=weight)\d+$")


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Attributes:
        described: the target in a line.
        lines: what a user should know of how it was chosen and what changes.
        files: for each file or part of the target its tensors.
        num_bytes: of all tensors.
        write: writes it, reporting bytes as they pass, and returns its folder.
        hint: what to do next.
    """

    described: str
    lines: tuple[str, ...]
    files: Mapping[str, Mapping[str, StoredTensor]]
    write: Callable[[Progress], Path]
    hint: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.num_bytes for tensors in self.files.values() for t in tensors.values())

    def listing(self) -> Iterator[str]:
        """Yields the tensors of each file in lines; those that differ in numbers only share one."""
        for file, tensors in self.files.items():
            size = sum(t.num_bytes for t in tensors.values())
            yield f"{file}: {len(tensors):,} tensors, {in_units(size, 'B')}"
            alike: dict[tuple[str, StoredTensor], int] = {}
            for name, tensor in tensors.items():
                key = _NUMBER.sub("*", name), tensor
                alike[key] = alike.get(key, 0) + 1
            for (name, tensor), count in alike.items():
                yield f"  {name}  {list(tensor.shape)} {tensor.dtype_name}{f'  x {count}' if count > 1 else ''}"


def plan_hf(
    source: Opened, save_dir: Path, dtype: torch.dtype | None, with_tokenizer: bool, **options: Any
) -> Conversion:
    """Returns the plan of writing a Hugging Face folder.

    Args:
        options: see `plan_export`.

    Raises:
        ConfigError: the class cannot compute the model.
        CheckpointError: the source lacks tensors, or `save_dir` exists.
        DataError: the tokenizer is not where the source says.
    """
    require_new(save_dir)
    tokenizer = None
    if with_tokenizer:
        tokenizer = replace(tokenizer_files(source.data), chat=chat_of(source.tensors.attachments))
    plan = plan_export(source.tensors, dtype=dtype, tokenizer=tokenizer, **options)
    family = plan.target.family
    lines = (*plan.target.why, *(tokenizer.notes if tokenizer else ("The folder has no tokenizer.",)))
    trust = ", trust_remote_code=True" if family.name == "samoe" else ""
    hint = f'\n  AutoModelForCausalLM.from_pretrained("{save_dir}", dtype="auto"{trust})'
    if tokenizer is not None:
        hint += f'\n  AutoTokenizer.from_pretrained("{save_dir}"{trust})'
    described = f"the Hugging Face class {family.architecture} in {save_dir}"
    return Conversion(described, lines, plan.shards, partial(write_export, plan, save_dir), hint)


def plan_gguf(source: Opened, save_dir: Path, dtype: torch.dtype | None, with_tokenizer: bool) -> Conversion:
    """Returns the plan of writing llama.cpp's file, model.gguf in a new folder.

    Raises:
        ConfigError: llama.cpp has no architecture that computes the model, or cannot cut a text as its tokenizer does.
        CheckpointError: `save_dir` exists.
        DataError: the tokenizer is not where the source says.
    """
    require_new(save_dir)
    plan = gguf_export.plan_export(source.tensors, source.data if with_tokenizer else None, dtype)
    described = f"llama.cpp's architecture {plan.architecture.name} in {save_dir}/{gguf_export.FILE}"
    write = partial(gguf_export.write_export, plan, save_dir)
    return Conversion(described, plan.lines, {gguf_export.FILE: plan.stored}, write)


def plan_torch_dist(source: Opened, save_dir: Path, dtype: torch.dtype | None, release: bool) -> Conversion:
    """Returns the plan of writing Megatron-LM's format torch_dist.

    Raises:
        ConfigError: Megatron has no such model.
        CheckpointError: the iteration is there already.
    """
    plan = plan_dist_export(_recast(source.tensors, dtype))
    iteration = None if release else int(source.tensors.train_state.get("iteration", 0))
    name = iteration_name(iteration)
    require_new(save_dir / name)
    described = f"Megatron-LM's format torch_dist in {save_dir}"
    write = partial(write_dist_export, plan, save_dir, iteration)
    return Conversion(described, plan.notes, {name: plan.stored}, write)


def plan_native(source: Opened, save_dir: Path, dtype: torch.dtype | None, with_tokenizer: bool) -> Conversion:
    """Returns the plan of writing a checkpoint of this program.

    Raises:
        CheckpointError: the iteration is there already.
    """
    tensors = _recast(source.tensors, dtype)
    iteration = int(tensors.train_state.get("iteration", 0))
    final = store.iteration_dir(save_dir, iteration)
    if final.exists():
        raise CheckpointError(f"{final} exists; nothing is overwritten. Give another --save-dir.")
    config, kept_at = source_config(tensors), save_dir.resolve() / TOKENIZER
    lines: tuple[str, ...] = ()
    if source.kind == "hf" and with_tokenizer:
        data, line = imported_tokenizer(config.data, source.directory, kept_at)
        config, lines = replace(config, data=data), (line,)
    copied = config.data.tokenizer_model == str(kept_at) and source.kind == "hf"
    if copied and kept_at.exists():
        raise CheckpointError(f"{kept_at} exists; nothing is overwritten. Give another --save-dir.")

    # A copied tokenizer is not yet where the configuration says.
    read_now = replace(config.data, tokenizer_model=str(source.directory / TOKENIZER)) if copied else config.data
    carried = {**read_files(read_now), **tensors.attachments} if with_tokenizer else {}
    made = EditedModel(to_mapping(config), tensors.train_state, attachments=carried)
    for name in tensors.tensors:
        made.keep(tensors, name)

    def write(progress: Progress) -> Path:
        require_space(save_dir, sum(t.num_bytes for t in made.tensors.values()))
        with ReadAhead(made, list(made.tensors), progress) as ahead:
            written = write_checkpoint(save_dir, iteration, ahead)
        if copied:
            shutil.copyfile(source.directory / TOKENIZER, kept_at)
        return written

    hint = how_to_train_on(save_dir)
    return Conversion(f"a checkpoint of this program in {final}", lines, {final.name: tensors.tensors}, write, hint)


def how_to_train_on(save_dir: Path) -> str:
    """Returns the sentence and the command with which a run trains a written model on, on the data of a configuration."""
    return (
        " To train on, with config.yaml for the data:\n  megatron-samoe pretrain --config config.yaml "
        f"--pretrained-checkpoint {shlex.quote(str(save_dir))} --use-checkpoint-args --run-dir runs/trained-on"
    )


def _recast(source: GlobalTensors, dtype: torch.dtype | None) -> GlobalTensors:
    """Returns a model in another precision, if one is given; what a run keeps in fp32 whatever its precision stays so."""
    if dtype is None:
        return source
    native = native_model(source)
    training = replace(native.config.training, bf16=dtype == torch.bfloat16, fp16=False)
    changed = replace(native, config=replace(native.config, training=training))
    edited = EditedModel(to_mapping(changed.config), source.train_state, attachments=source.attachments)
    for name, stored in source.tensors.items():
        if not name.startswith("optimizer."):
            edited.keep(source, name, dtype=changed.tensors.get(name, stored).dtype)
    return edited
