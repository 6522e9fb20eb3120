"""--load of a folder above runs: the runs are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_samoe.config import CheckpointConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError
from tests.harness.serving import save_tiny


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        store.find_checkpoint(CheckpointConfig(load=str(folder)))
    return str(caught.value)


def test_the_runs_below_are_named(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_tiny(tmp_path / "runs" / name / "checkpoints", "dense")
    (tmp_path / "runs" / "notes").mkdir()
    for folder in (tmp_path / "runs", tmp_path):
        said = refusal(folder)
        assert f"--load {folder} is a folder above runs and has no checkpoint itself: give one of " in said
        assert said.endswith(f"{tmp_path}/runs/first, {tmp_path}/runs/second.")
    assert store.find_checkpoint(CheckpointConfig(load=f"{tmp_path}/runs/first")) is not None
    with pytest.raises(CheckpointError, match=r"--pretrained-checkpoint \S+ is a folder above runs"):
        store.refuse_without_checkpoint(str(tmp_path / "runs"), "--pretrained-checkpoint")


def test_copied_checkpoints_are_named_by_their_folder(tmp_path: Path) -> None:
    save_tiny(tmp_path / "kept", "dense")
    assert refusal(tmp_path).endswith(f"give one of {tmp_path}/kept.")
