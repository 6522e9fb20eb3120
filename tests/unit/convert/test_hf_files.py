"""Files of Hugging Face folders: what is written is what the libraries read, damaged or foreign ones are named, and nothing is rounded,
dropped or taken for something else in silence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_samoe.cli import convert
from megatron_samoe.convert.hf import safetensors_io
from megatron_samoe.convert.hf.folder import HFFolder
from megatron_samoe.convert.hf.safetensors_io import SafetensorsReader, SafetensorsWriter
from megatron_samoe.convert.hf.source import HFSource
from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.convert.megatron.rank_files import FILE_NAME
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor, write_checkpoint
from megatron_samoe.errors import CheckpointError
from tests.harness.megatron_files import write_rank_files
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.hostile.changes import Bomb
from tests.unit.convert.memory_source import assert_equal, new_source

TABLE = table(__file__)

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "empty": torch.zeros(0, 5),
    "b": torch.tensor(2.5, dtype=torch.bfloat16),
    "c": torch.arange(5),
    "d": torch.rand(7).half(),
    "e": torch.tensor([True, False]),
    "f": torch.rand(3, 3, dtype=torch.float64),
}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Writes a file with our writer."""
    with SafetensorsWriter(path, {n: StoredTensor(tuple(t.shape), t.dtype) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return path


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    read = safetensors.torch.load_file(write(tmp_path / "x.safetensors", TENSORS))
    assert_equal(read, TENSORS)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    safetensors.torch.save_file(TENSORS, tmp_path / "y.safetensors", {"format": "pt", "other": "words"})
    reader = SafetensorsReader(tmp_path / "y.safetensors")
    assert_equal({name: reader.read(name) for name in reader.tensors}, TENSORS)


def test_large_views_are_copied_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "BLOCK_BYTES", 100)
    monkeypatch.setattr(safetensors_io, "FLUSH_BYTES", 256)
    base = torch.randn(3, 1, 17, 8)
    views = {"whole": base, "turned": base.permute(3, 2, 1, 0), "long": torch.arange(999.0), "one": base[0, 0, 0, 0]}
    stored = {name: StoredTensor(tuple(v.shape), torch.bfloat16) for name, v in views.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", stored) as writer:
        for name, view in views.items():
            blocks = list(safetensors_io._blocks(view))
            assert all(b.nbytes <= 100 for b in blocks)
            assert torch.equal(torch.cat([b.flatten() for b in blocks]), view.flatten())
            writer.add(name, view)
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], view.bfloat16()) for name, view in views.items())


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: object = (2,), kind: object = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


#: Headers as they are in a file, for 16 bytes of tensors.
HEADERS: dict[str, str] = table(__file__)["headers"]


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_refused_where_the_library_refuses_it(case: str, tmp_path: Path) -> None:
    path = with_header(tmp_path / "x.safetensors", HEADERS[case].encode(), bytes(range(16)))
    try:
        expected = safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError, match=rf"{path} is not a safetensors file, is damaged, or is cut off: \w"):
            SafetensorsReader(path)
        assert not case.startswith("sound")
    else:
        reader = SafetensorsReader(path)
        assert_equal({name: reader.read(name) for name in reader.tensors}, expected)


def test_quantized_weights_are_not_read(tmp_path: Path) -> None:
    path = with_header(tmp_path / "x.safetensors", {"a": entry(0, 8, (8,), "F8_E4M3")}, bytes(8))
    with pytest.raises(CheckpointError, match=r"a has dtype 'F8_E4M3'.*quantized weights are not"):
        SafetensorsReader(path)


def test_a_tensor_in_two_files_of_a_folder_is_refused(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write(tmp_path / f"{name}.safetensors", TENSORS if name == "1" else {"c": torch.zeros(5)})
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a.weight": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"holds c in two files, and 2.safetensors is one"):
        HFFolder(tmp_path)


def test_files_that_are_none_or_cut_off_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"PK", b"PK\x03\x04" + bytes(200), struct.pack("<Q", 1 << 62) + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            SafetensorsReader(path)
    write(tmp_path / "whole", TENSORS)
    path.write_bytes((tmp_path / "whole").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is cut off"):
        SafetensorsReader(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SafetensorsReader(tmp_path / "nothing")
    reader = SafetensorsReader(tmp_path / "whole")
    (tmp_path / "whole").write_bytes((tmp_path / "whole").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut off within f"):
        reader.read("f")


def folder_with(tmp_path: Path, **files: bytes | str) -> Path:
    for name, content in {"config.json": "{}", **files}.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name.replace("__", ".")).write_bytes(data)
    return tmp_path


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(("files", "message"), TABLE["incomplete"])
def test_folders_that_are_incomplete_are_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        HFFolder(folder_with(tmp_path, **files))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Bomb(Path.touch, Path("exploded"))}, "A pickle can run any code"),
        (Bomb(Path.touch, Path("exploded")), "A pickle can run any code"),
        ([torch.ones(2)], "more than a mapping of names to tensors"),
        ({"a": torch.ones(2), "step": 3}, "more than a mapping of names to tensors"),
        ({"a": torch.eye(3).to_sparse()}, "tensors"),
        ({"a": torch.zeros(1).expand(1 << 30)}, "tensors"),
        ({"a": torch.empty(3, device="meta")}, "tensors"),
        ({"a": {"b": torch.ones(2)}}, "tensors"),
    ],
)
def test_pickles_are_read_for_plain_tensors_only(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, folder_with(tmp_path) / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as error:
        HFFolder(tmp_path)
    assert "\n" not in str(error.value) and not Path("exploded").exists()


def test_plain_tensors_of_torch_save_are_read(tmp_path: Path) -> None:
    torch.save(TENSORS, folder_with(tmp_path) / "pytorch_model.bin")
    folder = HFFolder(tmp_path)
    assert_equal({name: folder.read(name) for name in folder.tensors}, TENSORS)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="save the model anew"):
        HFFolder(tmp_path)


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


@pytest.mark.parametrize(("wide", "native"), TABLE["wider"])
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
