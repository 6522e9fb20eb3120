"""A damaged byte of a saved tensor is noticed, or is none of the tensor's."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest
import torch

from megatron_samoe.dist_checkpointing.saved_tensor import Window, read_saved_tensor, read_saved_tensor_into

TENSORS = {
    "matrix": torch.arange(600.0).view(20, 30),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "bf16": torch.rand(50).bfloat16(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_flipped_bit_is_noticed_or_harmless(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(TENSORS[name], buffer)
    content, path = buffer.getvalue(), tmp_path / "file"
    path.write_bytes(b"before" + content + b"after")
    read = read_saved_tensor(path, 6, len(content))
    assert torch.equal(read, TENSORS[name]) and read.dtype == TENSORS[name].dtype
    chance, noticed = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(b"before" + damaged + b"after")
        try:
            assert torch.equal(read_saved_tensor(path, 6, len(content)), TENSORS[name])
        except AssertionError:
            raise
        except Exception:
            noticed += 1
    assert noticed > 30


def test_a_tensor_is_read_to_its_place_where_it_fits(tmp_path: Path) -> None:
    saved, place = torch.arange(600.0).view(20, 30), torch.zeros(40, 30)
    path, buffer = tmp_path / "file", io.BytesIO()
    torch.save(saved, buffer)
    content = buffer.getvalue()
    path.write_bytes(b"before" + content + b"after")

    def read_into(target: torch.Tensor) -> bool:
        with open(path, "rb", buffering=0) as file:
            return read_saved_tensor_into(target, file, 6, len(content))

    assert read_into(place[10:30]) and torch.equal(place[10:30], saved)
    assert not place[:10].any() and not place[30:].any()
    for other in (torch.zeros(30, 20), torch.zeros(30, 20).t(), torch.zeros(20, 30).double(), torch.zeros(600)):
        assert not read_into(other) and not other.any()
    for view in (saved.t(), saved[:10]):  # what is saved is the storage
        buffer = io.BytesIO()
        torch.save(view, buffer)
        content = buffer.getvalue()
        path.write_bytes(b"before" + content)
        assert not read_into(torch.zeros(view.shape))
    path.write_bytes(b"before" + content[:-1])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        read_into(torch.zeros(20, 30))


def test_a_part_of_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with open(tmp_path / "file", "rb") as file:
        window = Window(file, 10, 20)
        assert window.read(5) == bytes(range(10, 15)) and window.tell() == 5
        assert window.seek(-3, os.SEEK_END) == 17 and window.read() == bytes(range(27, 30)) and window.read(9) == b""
        assert window.seek(2, os.SEEK_SET) == 2 and window.seek(3, os.SEEK_CUR) == 5 and window.read(1) == bytes([15])
        with pytest.raises(ValueError, match="before the start"):
            window.seek(-21, os.SEEK_END)
