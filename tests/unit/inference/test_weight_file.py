"""Weights in a file: contents, addresses and text stay; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_samoe.errors import DataError
from megatron_samoe.inference import Engine
from megatron_samoe.inference.weight_memory import keep_in_file
from tests.unit.inference.tiny_models import generated, loaded_tiny


def mapped_files() -> str:
    """Returns the lines of this process's memory map that name deleted files."""
    return "\n".join(line for line in Path("/proc/self/maps").read_text().splitlines() if "(deleted)" in line)


def test_contents_and_addresses_stay(tmp_path: Path) -> None:
    whole = torch.randn(300, 1000)
    views = [whole[:100], whole[100:], torch.randn(3), torch.randn(5000, 257, dtype=torch.bfloat16)]
    copies, addresses = [v.clone() for v in views], [v.data_ptr() for v in views]
    moved = keep_in_file(views, tmp_path)
    assert 0.9 * (whole.nbytes + views[3].nbytes) < moved <= whole.nbytes + views[3].nbytes
    assert str(tmp_path) in mapped_files() and not list(tmp_path.iterdir())
    for view, copy, address in zip(views, copies, addresses, strict=True):
        assert view.data_ptr() == address and torch.equal(view, copy)
    views[0].zero_()  # stays this process's own
    assert not views[0].any() and torch.equal(views[1], copies[1])


@pytest.mark.parametrize("serving", ["folded", "on-the-fly"])
def test_text_is_the_same(tmp_path: Path, serving: str) -> None:
    texts = []
    for folder in (None, tmp_path):
        engine = Engine(loaded_tiny("samoe", style="llama", moe_router_topk=2), serving=serving, weights_folder=folder)
        texts.append(generated(engine, [(1, 2, 3)], 8))
    assert texts[0] == texts[1]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        keep_in_file([torch.randn(4096)], tmp_path / "nowhere")
