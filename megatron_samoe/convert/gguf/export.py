"""Export to GGUF: a plan of what will be written, then the writing of it, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.gguf.architectures import Architecture, choose_architecture, is_plain, metadata, tensors
from megatron_samoe.convert.gguf.tokenizer import Vocabulary, vocabulary
from megatron_samoe.convert.hf.export import native_model
from megatron_samoe.convert.hf.parts import Part
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.convert.output_folder import new_folder, require_space
from megatron_samoe.convert.read_ahead import Progress, ReadAhead
from megatron_samoe.datasets.carried_tokenizer import chat_of
from megatron_samoe.datasets.chat_template import read_chat
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.errors import ConfigError

FILE = "model.gguf"


@dataclass(frozen=True)
class GGUFPlan:
    """The content of a GGUF file before it is written.

    Attributes:
        source: of native tensors, folded.
        stored: of the file, by name.
        vocabulary: None for a file without.
        lines: what a user should know.
    """

    source: GlobalTensors
    native: NativeModel
    architecture: Architecture
    tensors: tuple[Part, ...]
    stored: Mapping[str, StoredTensor]
    vocabulary: Vocabulary | None
    lines: tuple[str, ...]

    @property
    def runs(self) -> list[tuple[str, list[Part]]]:
        """Native tensors in the order of writing, each with a run of the parts that it gives."""
        return [(name, list(parts)) for name, parts in groupby(self.tensors, lambda part: part.native)]


def plan_export(source: GlobalTensors, data: DataConfig | None, dtype: torch.dtype | None = None) -> GGUFPlan:
    """Returns the plan of an export; nothing is read or written yet.

    Args:
        data: options of the tokenizer; None to write none.
        dtype: of matrices, bf16 or fp32; as the model computes if not given. Norms, biases and routers are fp32.

    Raises:
        ConfigError: llama.cpp has no such architecture, or does not know the tokenizer; or the package gguf is missing.
    """
    gguf_package()
    native = native_model(source)
    one, folded = choose_architecture(native)
    words = None if data is None else vocabulary(data, read_chat(chat_of(source.attachments)))
    lines = [f"llama.cpp computes it as {one.family.name}"]
    if native.moe.shares_experts:
        source = fold_shared(source)
        lines.insert(0, "what layers share is folded into each layer's own experts")
    lines.append("The file has no tokenizer." if words is None else f"Texts are cut as {words.model}, {words.pre}.")
    wide = dtype or source.tensors["embedding.word.weight"].dtype
    made = tensors(one, folded)
    stored = {t.name: StoredTensor(t.shape, torch.float32 if is_plain(t) else wide) for t in made}
    return GGUFPlan(source, folded, one, made, stored, words, tuple(lines))


def gguf_package() -> Any:
    """Returns the package gguf; ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("--to", "gguf", "needs the package gguf: pip install 'megatron_samoe[gguf]'") from None
    return gguf


def write_export(plan: GGUFPlan, directory: Path, progress: Progress = lambda _: None) -> Path:
    """Writes a planned export as a new folder, which appears when it is complete, and returns it.

    Args:
        progress: called with the bytes of each tensor that is written.

    Raises:
        CheckpointError: the folder exists, the disk is too small, or a tensor cannot be read.
    """
    gguf = gguf_package()
    require_space(directory, sum(t.num_bytes for t in plan.stored.values()))
    kinds = {torch.bfloat16: gguf.GGMLQuantizationType.BF16, torch.float16: gguf.GGMLQuantizationType.F16}
    with new_folder(directory) as folder:
        writer = gguf.GGUFWriter(folder / FILE, plan.architecture.name)
        writer.add_name(directory.name)
        for name, value in metadata(plan.architecture, plan.native).items():
            getattr(writer, f"add_{name}")(value)
        if plan.vocabulary is None:
            writer.add_tokenizer_model("none")
        else:
            plan.vocabulary.write(writer, plan.native.vocab_size)
        for name, stored in plan.stored.items():
            writer.add_tensor_info(name, stored.shape, np.dtype(np.float32), stored.num_bytes, kinds.get(stored.dtype))
        for what in ("header", "kv_data", "ti_data"):
            getattr(writer, f"write_{what}_to_file")()
        with ReadAhead(plan.source, [native for native, _ in plan.runs]) as source:
            for name, parts in plan.runs:
                native = source.read(name)
                for part in parts:
                    stored = plan.stored[part.name]
                    made = part.take(native).to(stored.dtype).contiguous()
                    writer.write_tensor_data(
                        made.numpy() if made.dtype == torch.float32 else made.view(torch.uint8).numpy()
                    )
                    progress(stored.num_bytes)
                del native  # not two at a time
        writer.close()
    return directory
