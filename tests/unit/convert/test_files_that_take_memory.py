"""Files whose contents would fill the memory are refused by their sizes, before they are read; and what names of theirs
are printed, as."""

from __future__ import annotations

import argparse
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_samoe.convert.hf.folder import MAX_JSON_BYTES, HFFolder, read_json
from megatron_samoe.convert.hf.safetensors_io import SafetensorsReader
from megatron_samoe.convert.hf.source import family_of
from megatron_samoe.convert.megatron.rank_files import load_rank_file
from megatron_samoe.dist_checkpointing.saved_tensor import find_saved_bytes, read_saved_tensor
from megatron_samoe.dist_checkpointing.store import refuse_wrong_values
from megatron_samoe.errors import CheckpointError, MegatronSamoeError, nearest, readable


def refused_cheaply(read: Callable[[], object], match: str) -> None:
    tracemalloc.start()
    with pytest.raises(MegatronSamoeError, match=match) as caught:
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 and len(str(caught.value)) < 2000 and str(caught.value).isprintable()


@pytest.mark.parametrize("num_bytes", [2 << 20, 100 << 20])
def test_a_header_longer_than_its_tensors_is_not_read(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", num_bytes))
        file.truncate(8 + num_bytes + 100)
    refused_cheaply(lambda: SafetensorsReader(path), f"its header has {num_bytes:,} bytes for 100 bytes of tensors")


def test_a_header_of_many_empty_entries_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({f"tensor.{i}": torch.empty(0) for i in range(20_000)}, path)
    refused_cheaply(lambda: SafetensorsReader(path), "is not longer than its tensors")


def test_a_header_may_be_long_where_its_tensors_are(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({f"tensor.{i}": torch.zeros(40) for i in range(20_000)}, path)
    assert len(SafetensorsReader(path).tensors) == 20_000
    safetensors.torch.save_file({"empty": torch.empty(0)}, path)
    assert len(SafetensorsReader(path).tensors) == 1


def test_a_large_config_json_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "' + b"x" * MAX_JSON_BYTES + b'"}')
    refused_cheaply(lambda: read_json(tmp_path / "config.json"), "such a file has at most 16,777,216")


def test_a_long_name_is_compared_with_none() -> None:
    long = "llama" * 1_000_000
    assert nearest(long, [long]) == ""
    with pytest.raises(MegatronSamoeError) as caught:
        family_of({"model_type": long})
    assert len(str(caught.value)) < 1000


def bomb(path: Path, name: str = "data.pkl", claims: int | None = None) -> Path:
    """Writes a file of torch.save with an entry of 64 MB of zeros, compressed, or with one that only claims them."""
    torch.save({"args": argparse.Namespace(), "model": {"a": torch.ones(3)}}, path)
    with zipfile.ZipFile(path) as old:
        entries = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for entry, content in entries.items():
            is_it = entry.endswith(name)
            packing = zipfile.ZIP_DEFLATED if is_it and claims is None else zipfile.ZIP_STORED
            new.writestr(entry, content + bytes(64 << 20) if packing else content, compress_type=packing)
            if is_it and claims is not None:
                new.getinfo(entry).file_size = claims
    assert path.stat().st_size < 1e6
    return path


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "data/0"])
@pytest.mark.parametrize("claims", [None, 10**10])
def test_a_compressed_entry_is_seen_before_anything_is_read(name: str, claims: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = bomb(tmp_path / "pytorch_model.bin", name, claims)
    refused_cheaply(lambda: HFFolder(tmp_path), "is compressed")
    path.rename(tmp_path / "model_optim_rng.pt")
    refused_cheaply(lambda: load_rank_file(tmp_path), "is compressed")
    path = tmp_path / "model_optim_rng.pt"
    with pytest.raises(ValueError, match="is compressed"):
        read_saved_tensor(path, 0, path.stat().st_size)
    with open(path, "rb", buffering=0) as file, pytest.raises(ValueError, match="is compressed"):
        find_saved_bytes(file, 0, path.stat().st_size)


ODD = ["a\x1b[2J", "b\u202e", "c\n", "d" * 400]


@pytest.mark.parametrize("name", ODD)
def test_names_that_no_tensor_has_are_refused_and_shown_escaped(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors.torch.save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    refused_cheaply(lambda: HFFolder(tmp_path), "is not legal")
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    refused_cheaply(lambda: HFFolder(tmp_path), "a tensor in it is called")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused_cheaply(lambda: HFFolder(tmp_path), "which is not a file of its folder")


def test_a_name_is_readable_whatever_it_holds() -> None:
    assert readable("layers.0.ö") == "layers.0.ö" and readable("\x1b[31m") == "\\x1b[31m"
    assert len(readable("x" * 10**6)) < 300


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As transformers has it: the index may be of an earlier save."""
    (tmp_path / "config.json").write_text("{}")
    safetensors.torch.save_file({"new": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"old": "gone.safetensors"}}))
    assert set(HFFolder(tmp_path).tensors) == {"new"}


@pytest.mark.parametrize("vocab_size", [10**12, 2**31])
def test_a_vocabulary_that_no_model_has(vocab_size: int) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is"):
        refuse_wrong_values({"vocab_size": vocab_size}, "train_state.json")
