"""A damaged byte of a saved tensor is noticed, or is none of the tensor's."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest
import torch

from megatron_samoe.dist_checkpointing.saved_tensor import SavedBytes, Window, find_saved_bytes, read_saved_tensor

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


def test_a_part_of_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with open(tmp_path / "file", "rb") as file:
        window = Window(file, 10, 20)
        assert window.read(5) == bytes(range(10, 15)) and window.tell() == 5
        assert window.seek(-3, os.SEEK_END) == 17 and window.read() == bytes(range(27, 30)) and window.read(9) == b""
        assert window.seek(2, os.SEEK_SET) == 2 and window.seek(3, os.SEEK_CUR) == 5 and window.read(1) == bytes([15])
        with pytest.raises(ValueError, match="before the start"):
            window.seek(-21, os.SEEK_END)
