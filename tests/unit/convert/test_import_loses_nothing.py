"""What an import may not do in silence: round a weight, drop a tensor, or take one for something that it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_samoe.cli import convert
from megatron_samoe.convert.hf.source import HFSource
from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.convert.megatron.rank_files import FILE_NAME
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import CheckpointError
from tests.harness.megatron_files import write_rank_files
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.unit.convert.memory_source import new_source

Change = Callable[[dict[str, torch.Tensor]], None]


def hf_folder(path: Path, change: Change, **options: Any) -> Path:
    """An exported Llama whose tensors are changed."""
    write_checkpoint(path / "native", 1, new_source(tiny_config("dense", style="llama", num_layers=2, **options)))
    assert convert.main(["--load-dir", str(path / "native"), "--save-dir", str(path / "hf"), "--to", "hf"]) == 0
    file = path / "hf/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return path / "hf"


def to_bf16(tensors: dict[str, torch.Tensor], keep: str = "nothing") -> None:
    for name in tensors:
        if keep not in name:
            tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("wide", "native"),
    [
        ("norm.weight", "final_norm.weight"),
        ("mlp", "layers.0.mlp.fc1.weight"),
        ("o_proj", "layers.1.attention.output.weight"),
    ],
)
def test_a_bf16_embedding_does_not_round_wider_weights(wide: str, native: str, tmp_path: Path) -> None:
    source = HFSource(hf_folder(tmp_path, lambda tensors: to_bf16(tensors, keep=wide)))
    original = open_folder(tmp_path / "native").tensors
    assert not source.native.config.training.bf16
    assert "several precisions" in source.notes[0] and "of float32" in source.notes[0]
    assert torch.equal(source.read(native), original.read(native))
    words, rounded = source.read("embedding.word.weight"), original.read("embedding.word.weight").bfloat16().float()
    assert torch.equal(words[:VOCAB_SIZE], rounded[:VOCAB_SIZE]), "the narrow ones keep their values"


def test_weights_of_one_precision_keep_it_without_a_word(tmp_path: Path) -> None:
    source = HFSource(hf_folder(tmp_path, to_bf16))
    assert source.native.config.training.bf16 and not source.notes
    assert all(tensor.dtype == torch.bfloat16 for tensor in source.tensors.values())


def test_asking_for_fp32_keeps_every_bit(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, lambda tensors: to_bf16(tensors, keep="down_proj"))
    arguments = ["--load-dir", str(folder), "--save-dir", str(tmp_path / "back"), "--dtype", "fp32"]
    assert convert.main(arguments) == 0
    back, original = open_folder(tmp_path / "back").tensors, open_folder(tmp_path / "native").tensors
    name = "layers.0.mlp.fc2.weight"
    assert back.tensors[name].dtype == torch.float32 and torch.equal(back.read(name), original.read(name))


def test_another_output_matrix_in_a_tied_model_is_refused(tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor], factor: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    options = {"untie_embeddings_and_output_weights": False}
    HFSource(hf_folder(tmp_path / "same", lambda tensors: add_head(tensors, 1.0), **options))
    folder = hf_folder(tmp_path / "other", lambda tensors: add_head(tensors, 1.5), **options)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    said = r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings"
    with pytest.raises(CheckpointError, match=said):
        HFSource(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_integers_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = (tensors["model.layers.0.mlp.up_proj.weight"] * 100).to(dtype)

    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds (int|bool).*quantized weights are not read"):
        HFSource(hf_folder(tmp_path, quantize))


def megatron_folder(
    path: Path, change: Callable[[dict[str, Any]], None], layout: str = "dense", **options: Any
) -> Path:
    write_checkpoint(path / "native", 1, new_source(tiny_config(layout, num_layers=2, **options)))
    file = write_rank_files(open_folder(path / "native").tensors, path / "megatron") / "mp_rank_00" / FILE_NAME
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)
    return path / "megatron"


def test_megatrons_wider_tensors_are_not_rounded(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["args"].bf16 = True
        for name, tensor in content["model"].items():
            if isinstance(tensor, torch.Tensor) and "layernorm" not in name:
                content["model"][name] = tensor.bfloat16()

    reader = MegatronReader(megatron_folder(tmp_path, change))
    assert reader.config["training"]["bf16"] is False and "several precisions" in reader.notes[0]
    expected = open_folder(tmp_path / "native").tensors.read("final_norm.weight")
    assert torch.equal(reader.read("final_norm.weight"), expected)
