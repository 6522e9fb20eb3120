"""A whole model read and written tensor by tensor, in one process."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, StoredTensor, write_checkpoint
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
    with pytest.raises(
        CheckpointError, match=r"b.weight is \[3, 5\] torch.float32 in place of \[3, 5\] torch.bfloat16"
    ):
        CheckpointReader(path).read("b.weight")


def test_a_table_of_files_whose_place_has_no_path_is_malformed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, Source(TENSORS))
    table = pickle.loads((path / METADATA).read_bytes())
    next(iter(table.storage_data.values())).relative_path = 7
    (path / METADATA).write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match="its table of files is malformed"):
        CheckpointReader(path)


def test_an_iteration_that_exists_is_not_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, Source(TENSORS))
    with pytest.raises(CheckpointError, match=r"iter_0000003 exists; give another folder"):
        write_checkpoint(tmp_path, 3, Source(TENSORS))


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Source):
        def read(self, name: str) -> Tensor:
            raise CheckpointError(f"{name} is damaged")

    with pytest.raises(CheckpointError, match="is damaged"):
        write_checkpoint(tmp_path, 3, Failing(TENSORS))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, Source(TENSORS))
    reader = CheckpointReader(path)
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    assert reader.verify() == [f"{file.name} differs from what was written"]
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: \S+ cannot be read"):
        reader.read("a.weight")


def test_folders_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train_state\.json cannot be read"):
        CheckpointReader(tmp_path)
    path = write_checkpoint(tmp_path, 3, Source(TENSORS))
    (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        CheckpointReader(path)
    assert store.whole_iterations(tmp_path) == [3]
