"""A whole model read and written tensor by tensor, in one process; a damaged byte of one is noticed, or is none of the tensor's."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, StoredTensor, write_checkpoint
from megatron_samoe.dist_checkpointing.saved_tensor import SavedBytes, find_saved_bytes, read_saved_tensor
from megatron_samoe.dist_checkpointing.table_of_contents import METADATA
from megatron_samoe.errors import CheckpointError


@dataclass
class Source:
    """Tensors made when they are asked for, which notes who was asked for."""

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    train_state: Mapping[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        self.asked.append(name)
        stored = self.tensors[name]
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(stored.shape, generator=generator).to(stored.dtype)


TENSORS = {
    "b.weight": StoredTensor((3, 5), torch.float32),
    "a.weight": StoredTensor((4, 2, 3), torch.bfloat16),
    "scalar": StoredTensor((), torch.float64),
    "empty": StoredTensor((0, 3), torch.float32),
}


def test_what_is_written_tensor_by_tensor_reads_the_same(tmp_path: Path) -> None:
    source = Source(TENSORS, {"model": {"x": 1}}, {"iteration": 3, "digests": {"old": "1"}, "format_version": 0})
    path = write_checkpoint(tmp_path, 3, source)
    assert sorted(source.asked) == sorted(TENSORS), "each is made once"
    reader = CheckpointReader(path)
    assert dict(reader.tensors) == TENSORS
    for name in TENSORS:
        assert torch.equal(reader.read(name), source.read(name)), name
        assert reader.tensors[name].num_bytes == source.read(name).nbytes
    assert reader.config == {"model": {"x": 1}} and reader.train_state["iteration"] == 3
    assert reader.verify() == []


def test_a_table_of_contents_that_tells_another_type_is_damaged(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, Source(TENSORS))
    table = pickle.loads((path / METADATA).read_bytes())
    table.state_dict_metadata["b.weight"].properties.dtype = torch.bfloat16
    (path / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"b.weight is .*float32 in place of .*bfloat16"):
        CheckpointReader(path).read("b.weight")


def test_a_table_of_files_whose_place_has_no_path_is_malformed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, Source(TENSORS))
    table = pickle.loads((path / METADATA).read_bytes())
    next(iter(table.storage_data.values())).relative_path = 7
    (path / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match="its table of files is malformed"):
        CheckpointReader(path)


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Source):
        def read(self, name: str) -> Tensor:
            raise CheckpointError(f"{name} is damaged")

    with pytest.raises(CheckpointError, match="is damaged"):
        write_checkpoint(tmp_path, 3, Failing(TENSORS))
    assert list(tmp_path.iterdir()) == []


SAVED = {
    "matrix": torch.arange(600.0).view(20, 30),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "bf16": torch.rand(50).bfloat16(),
}


@pytest.mark.parametrize("name", SAVED)
def test_every_flipped_bit_is_noticed_or_harmless(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(SAVED[name], buffer)
    content, path = buffer.getvalue(), tmp_path / "file"
    path.write_bytes(b"before" + content + b"after")
    read = read_saved_tensor(path, 6, len(content))
    assert torch.equal(read, SAVED[name]) and read.dtype == SAVED[name].dtype
    chance, noticed = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(b"before" + damaged + b"after")
        try:
            assert torch.equal(read_saved_tensor(path, 6, len(content)), SAVED[name])
        except AssertionError:
            raise
        except Exception:
            noticed += 1
    assert noticed > 30


def test_elements_are_found_where_the_file_has_them_in_order(tmp_path: Path) -> None:
    saved = torch.arange(600.0).view(20, 30)
    path = tmp_path / "file"

    def find(tensor: torch.Tensor, cut: int | None = None) -> SavedBytes | None:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        content = buffer.getvalue()
        path.write_bytes(b"before" + content[:cut])
        with open(path, "rb", buffering=0) as file:
            return find_saved_bytes(file, 6, len(content))

    found = find(saved)
    assert found is not None and (found.shape, found.dtype) == ((20, 30), torch.float32)
    assert path.read_bytes()[found.offset :][: saved.nbytes] == saved.numpy().tobytes()
    for view in (saved.t(), saved[:10]):  # what is saved is the storage
        assert find(view) is None
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        find(saved, -1)
